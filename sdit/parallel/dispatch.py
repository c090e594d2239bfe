"""The dispatcher of an expert-parallel group: samples go to cold experts, hot experts' weights come to the samples.

B own samples of n in the group, L tokens, D width, M experts of which this rank owns M_local, S rows sent, R received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdit.contracts import TaskView
from sdit.model.moe.experts import Expert, Experts, LinearExperts
from sdit.model.moe.merged import merged_linear
from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan, Work
from sdit.parallel.exchange import Pending, Wire, begin_rows, begin_share
from sdit.parallel.experts import SpreadExperts, flat_rows, unflatten_rows


@dataclass(frozen=True)
class _Job:
    """Work on the device: `samples` (R,), `columns` (K,) of the group's gates; `counted` (K,) is 0 for those left out;
    `busy` are the rows that use any column (None: all), and `by_column` lists those that use each."""

    samples: Tensor
    columns: Tensor
    counted: Tensor | None
    busy: Tensor | None
    by_column: list[tuple[int, Tensor]]


@dataclass(frozen=True)
class _Block:
    send_rows: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    local: _Job
    remote: _Job
    travels: bool
    hand_counts: list[int]
    hand_slots: Tensor


class ExchangeDispatcher:
    """Follows the plan of the present micro-step; without one (sampling) all samples share a task."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._plan: MicroPlan | None = None
        self._blocks: list[_Block] = []
        self._shared = False
        self.evaluates = False  # follow the plan although no gradient is needed

    def follow(self, plan: MicroPlan, layout: Layout, travels: Sequence[bool], device: torch.device) -> None:
        """Take over the plan of a micro-step; all its indices go to the device in one copy."""
        self._plan, self._device = plan, device
        self._blocks = _upload(plan, layout, travels, self._wire.place, device)

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
        return TaskView(tasks, plan.own, torch.from_numpy(plan.experts).to(task.device, non_blocking=True), kept)

    def start(self, block: int, z: Tensor, gates: Tensor, experts: nn.Module) -> Callable[[], Tensor]:
        """Begin m (B, L, D) for own tokens z (B, L, D) and the group's gates (n, M), or (1, M) while sampling."""
        assert isinstance(experts, (Experts, SpreadExperts))
        if self._shared:
            return lambda: self._mix_shared(z, gates, experts)
        todo = self._blocks[block]
        sharing = self._share(experts, todo)
        outward = None
        if todo.travels:
            outward = begin_rows(self._wire, z.index_select(0, todo.send_rows), todo.send_splits, todo.receive_splits)
        borrowed = {} if sharing is None else unflatten_rows(experts, sharing.wait())
        mixed = _mix_rows(z, gates, todo.local, experts, borrowed)
        homeward = self._serve(outward, gates, todo, experts, z) if outward is not None else None

        def finish() -> Tensor:
            if homeward is None:
                return mixed
            return mixed.index_add(0, todo.send_rows, homeward.wait().to(mixed.dtype))

        return finish

    def _serve(
        self, outward: Pending, gates: Tensor, todo: _Block, experts: Experts | SpreadExperts, z: Tensor
    ) -> Pending:
        """Compute what arrived and start sending it back."""
        arrived = outward.wait()
        served = _mix_rows(arrived, gates, todo.remote, experts, {})
        return begin_rows(self._wire, served.to(z.dtype), todo.receive_splits, todo.send_splits)

    def _share(self, experts: Experts | SpreadExperts, todo: _Block) -> Pending | None:
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
        partial = experts(z, gates[:, own])
        # Every rank has other samples: each gets the others' tokens, serves its own experts and adds up.
        rows = len(z)
        everyone = [torch.empty_like(z) for _ in range(self._wire.ranks)]
        dist.all_gather(everyone, z.contiguous(), group=self._wire.group)
        served = torch.cat(
            [partial if i == self._wire.place else experts(other, gates[:, own]) for i, other in enumerate(everyone)]
        )
        dist.all_reduce(served, group=self._wire.group)
        return served[self._wire.place * rows : (self._wire.place + 1) * rows]


def _local(experts: Experts | SpreadExperts) -> Experts:
    return experts.local if isinstance(experts, SpreadExperts) else experts


def _mix_rows(
    z: Tensor, gates: Tensor, job: _Job, experts: Experts | SpreadExperts, borrowed: dict[str, Tensor]
) -> Tensor:
    """(rows, L, D) of tokens z with the job's experts: columns of own experts first, then those borrowed."""
    local = _local(experts)
    weights = gates.index_select(0, job.samples).index_select(1, job.columns)
    if isinstance(local, LinearExperts):
        w = torch.cat([local.w, borrowed["w"]]) if borrowed else local.w
        b = torch.cat([local.b, borrowed["b"]]) if borrowed else local.b
        # A visitor's experts at hand are computed where it came from: their columns do not count here.
        weights = weights if job.counted is None else weights * job.counted
        if job.busy is None:
            return merged_linear(z, weights, w, b)
        busy = merged_linear(z.index_select(0, job.busy), weights.index_select(0, job.busy), w, b)
        return busy.new_zeros(z.shape).index_add_(0, job.busy, busy)
    own = experts.each()
    functions = own + (experts.each(**borrowed) if borrowed else [])
    tokens = z.to(next(local.parameters()).dtype)
    mixed = torch.zeros_like(tokens)
    for column, rows in job.by_column:
        gate = weights[:, column].index_select(0, rows).to(tokens.dtype)
        mixed.index_add_(0, rows, functions[column](tokens.index_select(0, rows)) * gate[:, None, None])
    idle = _idle_inputs(job, (tokens, weights), own, list(borrowed.values()))
    return _Depend.apply(mixed, *idle) if idle else mixed


def _idle_inputs(job: _Job, rows: Sequence[Tensor], own: Sequence[Expert], borrowed: Sequence[Tensor]) -> list[Tensor]:
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


class _Packer:
    """Collects index arrays on the host; `views` are their slices of one device tensor."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def keep(self, values: np.ndarray) -> int:
        self._arrays.append(np.asarray(values, dtype=np.int64))
        return len(self._arrays) - 1

    def views(self, device: torch.device) -> tuple[Tensor, ...]:
        packed = torch.from_numpy(np.concatenate(self._arrays)).to(device, non_blocking=True)
        return packed.split([len(array) for array in self._arrays])


@dataclass(frozen=True)
class _JobDraft:
    samples: int
    columns: int
    counted: int | None
    busy: int | None
    by_column: list[tuple[int, int]]

    def job(self, views: Sequence[Tensor]) -> _Job:
        counted = None if self.counted is None else views[self.counted]
        busy = None if self.busy is None else views[self.busy]
        by_column = [(column, views[rows]) for column, rows in self.by_column]
        return _Job(views[self.samples], views[self.columns], counted, busy, by_column)


def _upload(plan: MicroPlan, layout: Layout, travels: Sequence[bool], place: int, device: torch.device) -> list[_Block]:
    """The plan's index arrays on the device: one packed copy, then views."""
    packer, drafts = _Packer(), []
    own_samples = np.arange(plan.own.start, plan.own.stop)
    for block, slots, hand in zip(plan.blocks, layout.slots, layout.at_hand, strict=True):
        foreign = [ids[hand[ids]] for rank, ids in enumerate(slots) if rank != place]
        local = _draft(packer, block.local, np.concatenate([slots[place], *foreign]), own_samples, None)
        counted = None if not hand[slots[place]].any() else ~hand[slots[place]]
        remote = _draft(packer, block.remote, slots[place], block.remote.samples, counted)
        counts = [int(hand[ids].sum()) for ids in slots]
        drafts.append(
            (packer.keep(block.send_rows), local, remote, counts, packer.keep(np.flatnonzero(hand[slots[place]])))
        )
    views = packer.views(device)
    return [
        _Block(
            send_rows=views[send],
            send_splits=block.send_splits.tolist(),
            receive_splits=block.receive_splits.tolist(),
            local=local.job(views),
            remote=remote.job(views),
            travels=bool(moves),
            hand_counts=counts,
            hand_slots=views[hand_slots],
        )
        for block, moves, (send, local, remote, counts, hand_slots) in zip(plan.blocks, travels, drafts, strict=True)
    ]


def _draft(
    packer: _Packer, work: Work, columns: np.ndarray, samples: np.ndarray, counted: np.ndarray | None
) -> _JobDraft:
    """A job on all rows `samples` (rising): gate rows, gate columns, and per column the rows that use its expert."""
    rows = np.searchsorted(samples, work.samples[work.pair_rows])
    users = [(column, rows[work.pair_experts == expert]) for column, expert in enumerate(columns)]
    return _JobDraft(
        samples=packer.keep(samples),
        columns=packer.keep(columns),
        counted=None if counted is None else packer.keep(counted),
        busy=None if len(work.samples) == len(samples) else packer.keep(np.searchsorted(samples, work.samples)),
        by_column=[(column, packer.keep(used)) for column, used in users if len(used)],
    )
