"""The dispatcher of an expert-parallel group: samples go to cold experts, hot experts' weights come to the samples.

B own samples of n in the group, L tokens, D width, M experts of which this rank owns M_local, S rows sent, R received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdit.contracts import Mixture, TaskView
from sdit.model.moe.dispatch import Ready
from sdit.model.moe.experts import Expert, Experts, LinearExperts
from sdit.model.moe.merged import merged_linear
from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan
from sdit.parallel.exchange import Pending, Wire, begin_rows, begin_share
from sdit.parallel.experts import SpreadExperts, flat_rows, unflatten_rows
from sdit.parallel.jobs import BlockJobs, Job, upload

# A transfer's token has a shape without its memory, which torch.compile cannot trace: its graph breaks here, and compiles what
# lies between.
eagerly = torch.compiler.disable


class _Exchange:
    """A mixture whose rows are on their way, if any (`outward`): `mixed` (B, L, D) is what was computed here of it.

    `then` is called when it is complete. That it is so where no row travels, too, keeps the order of backward, hence of the
    gradients that fill ZeRO's buckets, the same in all groups, whose routes differ.
    """

    def __init__(
        self, wire: Wire, todo: BlockJobs, gates: Tensor, experts: Experts | SpreadExperts, mixed: Tensor,
        outward: Pending | None, then: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        self._wire, self._todo, self._gates, self._experts = wire, todo, gates, experts
        self._mixed: Tensor | None = mixed
        self._outward, self._then = outward, then
        self._homeward: Pending | None = None

    @eagerly
    def serve(self) -> None:
        """Compute what arrived and start sending it back."""
        if self._outward is None:
            return
        todo, arrived = self._todo, self._outward.wait()
        served = _mix_rows(arrived, self._gates, todo.remote, self._experts, {})
        self._homeward = begin_rows(self._wire, served.to(arrived.dtype), todo.receive_splits, todo.send_splits)
        self._outward = None

    @eagerly
    def wait(self) -> Tensor:
        self.serve()
        mixed, self._mixed = self._mixed, None
        assert mixed is not None, "a mixture is waited for once"
        if self._homeward is not None:
            mixed = mixed.index_add(0, self._todo.send_rows, self._homeward.wait().to(mixed.dtype))
        if self._then is not None:
            self._then()
        return mixed


class ExchangeDispatcher:
    """Follows the plan of the present micro-step; without one (sampling) all samples share a task."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._plan: MicroPlan | None = None
        self._blocks: list[list[BlockJobs]] = []  # [part][block]
        self._at_hand: dict[str, Tensor] = {}  # received by the first part of a block, for all of them
        self._experts: tuple[Experts | SpreadExperts, ...] = ()
        self._ahead: tuple[int, Pending] | None = None  # the next block, and the weights on their way for it
        self._shared = False
        self.evaluates = False  # follow the plan although no gradient is needed

    def look_ahead(self, experts: Sequence[Experts | SpreadExperts]) -> None:
        """From now on the weights that a block needs travel behind attention and MLP of the one before; `experts` of all."""
        self._experts = tuple(experts)

    def follow(self, plan: MicroPlan, layout: Layout, device: torch.device) -> None:
        """Take over the plan of a micro-step; all its indices go to the device in one copy."""
        assert self._ahead is None, "weights are on their way for a block that did not follow"
        self._plan = plan
        self._blocks = upload(plan, layout, self._wire.place, device)

    def view(self, task: Tensor) -> TaskView:
        """The group's samples in seated order with the plan's choice; while sampling, the one task of all samples."""
        self._shared = not torch.is_grad_enabled() and not self.evaluates
        if self._shared:
            assert len(task) == 1 or task.stride(0) == 0, "spread experts sample with one time for all samples"
            return TaskView(task=task[:1], own=torch.zeros(len(task), dtype=torch.int64, device=task.device))
        plan = self._plan
        assert plan is not None and plan.own.stop - plan.own.start == len(task), "no plan for this micro-step"
        kept = None if plan.kept is None else torch.from_numpy(plan.kept).to(task.device, non_blocking=True)
        tasks = torch.from_numpy(plan.tasks).to(task.device, non_blocking=True)
        experts = torch.from_numpy(plan.experts).to(task.device, non_blocking=True)
        return TaskView(tasks, plan.own, experts, kept, tuple(part.rows for part in plan.parts))

    @eagerly
    def start(self, block: int, z: Tensor, gates: Tensor, experts: nn.Module, part: int = 0) -> Mixture:
        """Begin m (B, L, D) for own tokens z (B, L, D) of a part and the group's gates (n, M), or (1, M) while sampling."""
        assert isinstance(experts, (Experts, SpreadExperts))
        if self._shared:
            return Ready(self._mix_shared(z, gates, experts))
        todo, outward = self._blocks[part][block], None
        if todo.travels:
            outward = begin_rows(self._wire, z.index_select(0, todo.send_rows), todo.send_splits, todo.receive_splits)
        if part == 0:
            self._at_hand = self._receive_weights(block, experts)
        mixed = _mix_rows(z, gates, todo.local, experts, self._at_hand)
        if part + 1 == len(self._blocks):
            self._at_hand = {}  # from here on only the graph keeps them
        then = partial(self._share_ahead, block) if part == 0 else None
        return _Exchange(self._wire, todo, gates, experts, mixed, outward, then)

    def _receive_weights(self, block: int, experts: Experts | SpreadExperts) -> dict[str, Tensor]:
        """Parameters (n, ...) by name of the experts that come to the samples, those of linear ones behind the rank's own."""
        if self._ahead is not None:
            (sent_for, sharing), self._ahead = self._ahead, None
            assert sent_for == block, f"weights of block {sent_for} are on their way, block {block} is computed"
        else:
            begun = self._share(experts, self._blocks[0][block])
            if begun is None:
                return {}
            sharing = begun
        borrowed = unflatten_rows(experts, sharing.wait())
        local = _local(experts)
        if isinstance(local, LinearExperts):
            return {name: torch.cat([getattr(local, name), rows]) for name, rows in borrowed.items()}
        return borrowed

    def _share_ahead(self, block: int) -> None:
        """Once the first part's mixture of this block is there, begin what the next block needs."""
        if block + 1 < len(self._experts):
            sharing = self._share(self._experts[block + 1], self._blocks[0][block + 1])
            self._ahead = None if sharing is None else (block + 1, sharing)

    def _share(self, experts: Experts | SpreadExperts, todo: BlockJobs) -> Pending | None:
        """Exchange the weights of all experts at hand; None where there are none."""
        if not sum(todo.hand_counts) or self._wire.ranks == 1:
            return None
        return begin_share(self._wire, flat_rows(experts, todo.hand_slots), todo.hand_counts)

    def _mix_shared(self, z: Tensor, gates: Tensor, experts: Experts | SpreadExperts) -> Tensor:
        """All samples use the same experts: linear ones are merged where they live and added up, others are fetched."""
        if self._wire.ranks == 1:
            return experts(z, gates)
        own = torch.tensor(experts.ids, device=gates.device)
        local = _local(experts)
        if isinstance(local, LinearExperts):
            row = gates[:, own].to(local.w.dtype)
            merged = torch.cat([row @ local.w.flatten(1), row @ local.b], dim=1)
            dist.all_reduce(merged, group=self._wire.group)
            width = local.b.shape[1]
            return (z.to(merged.dtype).flatten(0, 1) @ merged[0, :-width].view(-1, width) + merged[0, -width:]).view_as(
                z
            )
        served_here = experts(z, gates[:, own])
        # Every rank has other samples: each gets the others' tokens, serves its own experts and adds up.
        rows = len(z)
        everyone = [torch.empty_like(z) for _ in range(self._wire.ranks)]
        dist.all_gather(everyone, z.contiguous(), group=self._wire.group)
        served = torch.cat(
            [
                served_here if i == self._wire.place else experts(other, gates[:, own])
                for i, other in enumerate(everyone)
            ]
        )
        dist.all_reduce(served, group=self._wire.group)
        return served[self._wire.place * rows : (self._wire.place + 1) * rows]


def _local(experts: Experts | SpreadExperts) -> Experts:
    return experts.local if isinstance(experts, SpreadExperts) else experts


def _mix_rows(
    z: Tensor, gates: Tensor, job: Job, experts: Experts | SpreadExperts, at_hand: dict[str, Tensor]
) -> Tensor:
    """(rows, L, D) of tokens z with the job's experts: columns of own experts first, then those that came here."""
    local = _local(experts)
    weights = gates.index_select(0, job.samples).index_select(1, job.columns)
    if isinstance(local, LinearExperts):
        w, b = at_hand.get("w", local.w), at_hand.get("b", local.b)
        # A visitor's experts at hand are computed where it came from: their columns do not count here.
        weights = weights if job.counted is None else weights * job.counted
        if job.busy is None:
            return merged_linear(z, weights, w, b)
        busy = merged_linear(z.index_select(0, job.busy), weights.index_select(0, job.busy), w, b)
        return busy.new_zeros(z.shape).index_add_(0, job.busy, busy)
    own = experts.each()
    functions = own + (experts.each(**at_hand) if at_hand else [])
    tokens = z.to(next(local.parameters()).dtype)
    mixed = torch.zeros_like(tokens)
    for column, rows in job.by_column:
        gate = weights[:, column].index_select(0, rows).to(tokens.dtype)
        mixed.index_add_(0, rows, functions[column](tokens.index_select(0, rows)) * gate[:, None, None])
    idle = _idle_inputs(job, (tokens, weights), own, list(at_hand.values()))
    return _Depend.apply(mixed, *idle) if idle else mixed


def _idle_inputs(job: Job, rows: Sequence[Tensor], own: Sequence[Expert], borrowed: Sequence[Tensor]) -> list[Tensor]:
    """The inputs of a job that its result does not use: all rows, own experts (one stands for all) or borrowed."""
    used = [column for column, _ in job.by_column]
    idle = [] if used else list(rows)
    if not any(column < len(own) for column in used):
        idle += _rows_of(own[0])
    return idle if any(column >= len(own) for column in used) else [*idle, *borrowed]


def _rows_of(expert: Expert) -> list[Tensor]:
    """One expert's parameters, as `each` took them from their stacks."""
    assert isinstance(expert, partial)
    return list(expert.keywords.values())


class _Depend(torch.autograd.Function):
    """Returns `result`; the idle inputs get zero gradients.

    Backward must meet the same transfers and reduce the same gradients, in the same order, on every rank: where no
    sample uses an expert, a rank would otherwise leave out a send that others wait for, or fill ZeRO's bucket with
    gradients in another order, to be added to those of other parameters.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *idle: Tensor) -> Tensor:
        ctx.shapes = [(value.shape, value.dtype, value.device) for value in idle]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)
