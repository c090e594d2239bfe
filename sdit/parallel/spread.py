"""A model's experts spread over the ranks of an expert-parallel group: layout, plans, and moving experts when it pays."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sdit.config import Config
from sdit.contracts import RawBatch
from sdit.model import DiffusionTransformer
from sdit.model.dit import Router
from sdit.model.moe.capacity import Capacity, dropped_per_block, keep_samples
from sdit.model.moe.choice import Choice, choose_exchange, decide_layout, worth_moving
from sdit.model.moe.experts import Experts, build_experts
from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan, plan_micro_step
from sdit.model.moe.routes import Routes, load_max_over_mean
from sdit.model.moe.traffic import Costs, Practice, expert_parameters, rank_work
from sdit.parallel.comm import Comm
from sdit.parallel.dispatch import ExchangeDispatcher
from sdit.parallel.exchange import Traffic, Wire
from sdit.parallel.experts import SpreadExperts, make_expert_groups
from sdit.topology import BatchPlan, ExpertGroups

_log = logging.getLogger(__name__)
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class StepStatistics:
    """What one step's plans say: (sample, expert) pairs dropped, and the fullest rank's work over the mean.

    `dropped_since` (depth,) also counts the steps since the last look.
    """

    dropped_fraction: float
    dropped_by_block: list[int]
    dropped_since: list[int]
    rank_work_max_over_mean: float


class ExpertSpread:
    """Everything expert parallelism adds to a run; with EP = 1 it is the capacity limit alone."""

    def __init__(self, config: Config, batch: BatchPlan, comm: Comm, ranks: int) -> None:
        from deepspeed.utils import groups as deepspeed_groups

        self.config, self.batch, self.comm, self.ranks = config, batch, comm, ranks
        self.groups = ExpertGroups(comm.world, ranks)
        make_expert_groups(ranks)
        self.traffic = Traffic(comm.device)
        group = deepspeed_groups._get_expert_parallel_group(f"ep_size_{ranks}")
        self.place = self.groups.place_of(comm.rank)
        self.wire = Wire(group, self.place, ranks, config.parallel.overlap, self.traffic)
        self.dispatcher = ExchangeDispatcher(self.wire)
        model = config.model
        index = np.tile(np.arange(model.experts.count) // (model.experts.count // ranks), (model.depth, 1))
        self.layout = Layout(index, np.zeros(index.shape, dtype=bool), ranks)
        self._routes: Routes | None = None
        self._kept: np.ndarray | None = None
        self._times: np.ndarray | None = None
        self._first_index = 0
        self._work: list[np.ndarray] = []
        self._dropped = np.zeros(model.depth, dtype=np.int64)

    def apply(self, model: DiffusionTransformer, seed_weights: Any) -> None:
        """Leave each router the experts of this rank; `seed_weights(model)` fills what is on the meta device."""
        if self.ranks > 1:
            for router, slots in zip(model.routers, self.layout.slots, strict=True):
                router.experts = build_experts(self.config.model.experts, self.config.model.width, slots[self.place])
        model.to_empty(device=self.comm.device)
        seed_weights(model)
        if self.ranks > 1:
            spread = []
            for router in model.routers:
                assert isinstance(router, Router) and isinstance(router.experts, Experts)
                router.experts = SpreadExperts(router.experts, self.config.model.experts.count, self.ranks)
                spread.append(router.experts)
            parallel = self.config.parallel
            # A block that is computed again in backward would look ahead in the wrong direction.
            if parallel.overlap and parallel.activation_checkpointing == "none":
                self.dispatcher.look_ahead(spread)
        model.dispatcher = self.dispatcher

    def stored(self) -> dict[str, Any]:
        """The layout as a checkpoint carries it."""
        return {"ranks": self.ranks, "place": self.layout.place.tolist(), "at_hand": self.layout.at_hand.tolist()}

    def restore(self, stored: dict[str, Any] | None) -> bool:
        """Take over a checkpoint's layout if it was made for as many ranks, blocks and experts; before `apply`."""
        if stored is None or stored["ranks"] != self.ranks:
            return False
        place, at_hand = np.array(stored["place"]), np.array(stored["at_hand"], dtype=bool)
        shape = self.layout.place.shape
        if place.shape != shape or at_hand.shape != shape or (np.sort(place) != np.sort(self.layout.place)).any():
            return False
        self.layout = Layout(place, at_hand, self.ranks)
        return True

    def reconsider(self, routes: Routes, placement_due: bool, first: bool) -> tuple[Layout, str] | None:
        """A better layout for the present gates, if any: (layout, reason). Experts at hand may change without a move.

        `first`: the run starts or changed its layout, and moves are not weighed against what they cost.
        """
        practice = self._practice(routes)
        now = choose_exchange(self._exchange, practice, self.layout.place, self.costs)
        best: Choice = now
        if placement_due and self._placement != "index":
            then = decide_layout(self._placement, self._exchange, practice, self.costs, self.layout.place)
            micro_steps = self.config.parallel.placement_refresh_images // self.batch.chunk
            if first or worth_moving(now, then, self.expert_parameters, micro_steps):
                best = then
        agreed = self._agree(best.layout)  # rank 0's: a tie broken differently anywhere would hang the exchange
        same = (agreed.place == self.layout.place).all() and (agreed.at_hand == self.layout.at_hand).all()
        return None if same else (agreed, best.reason)

    def _agree(self, layout: Layout) -> Layout:
        """Rank 0's layout on all ranks."""
        box = self.comm.from_first([layout.place.tolist(), layout.at_hand.tolist()])
        return Layout(np.array(box[0]), np.array(box[1], dtype=bool), self.ranks)

    def begin_step(self, routes: Routes, first_index: int, tasks: np.ndarray) -> None:
        """Plan what the whole global batch has in common: tasks (N,) and, under a capacity, who is kept."""
        self._begin(routes, first_index, tasks, self.config.model.experts.capacity_factor)
        if self._kept is not None:
            self._dropped += dropped_per_block(self._kept)

    def begin_evaluation(self, routes: Routes, first_index: int, tasks: np.ndarray) -> None:
        """The same for a global batch of held-out samples, under `capacity_factor_eval`; no gradient is needed."""
        self.dispatcher.evaluates = True
        self._begin(routes, first_index, tasks, self.config.model.experts.capacity_factor_eval)

    def end_evaluation(self) -> None:
        """Back to training and sampling; the traffic of the held-out samples is not counted."""
        self.dispatcher.evaluates = False
        self.traffic.forget()

    def _begin(self, routes: Routes, first_index: int, tasks: np.ndarray, factor: float | None) -> None:
        self._routes, self._times, self._first_index, self._kept, self._work = routes, tasks, first_index, None, []
        if factor is not None:
            capacity = Capacity(factor, self.config.model.experts.drop_policy, self.config.seed)
            self._kept = keep_samples(routes, tasks, first_index, capacity)

    def begin_micro_step(self, micro_step: int, samples: RawBatch) -> RawBatch:
        """Plan the micro-step, swap seats inside the group, and return the samples this rank computes."""
        assert self._routes is not None and self._times is not None
        plan = plan_micro_step(
            self._routes, self._times, self._kept, self.layout, self.batch, self.groups,
            self.comm.rank, micro_step, self._first_index, self.config.parallel.seating, self.config.parallel.halves,
        )  # fmt: skip
        self.dispatcher.follow(plan, self.layout, self.comm.device)
        self._work.append(rank_work(plan.experts, self.layout, plan.kept))
        return self._swap(plan, samples)

    def statistics(self) -> StepStatistics:
        """Of the present step's plans, and of the steps since the last call."""
        dropped = np.zeros_like(self._dropped) if self._kept is None else dropped_per_block(self._kept)
        share = 0.0 if self._kept is None else float(dropped.sum()) / self._kept.size
        since, self._dropped = self._dropped.tolist(), np.zeros_like(self._dropped)
        work = load_max_over_mean(np.sum([work.sum(axis=0, keepdims=True) for work in self._work], axis=0))
        return StepStatistics(share, dropped.tolist(), since, float(work.max()))

    @property
    def expert_parameters(self) -> int:
        experts, width = self.config.model.experts, self.config.model.width
        return expert_parameters(experts.kind, width, int(width * experts.mlp_ratio))

    @property
    def costs(self) -> Costs:
        """Bytes of a sample's tokens and of an expert on this run's wire."""
        size = ELEMENT_BYTES[self.config.train.precision]
        forwards = 1 if self.config.parallel.activation_checkpointing == "none" else 2
        row_bytes = self.config.model.tokens * self.config.model.width * size
        return Costs(row_bytes, self.expert_parameters * size, self.ranks, forwards)

    @property
    def _exchange(self) -> Literal["auto", "tokens", "weights"]:
        return self.config.parallel.exchange

    @property
    def _placement(self) -> Literal["index", "balanced", "path"]:
        return self.config.parallel.placement

    def _practice(self, routes: Routes) -> Practice:
        return Practice(routes, self.ranks, self.batch.micro_batch, self.config.parallel.seating)

    def _swap(self, plan: MicroPlan, samples: RawBatch) -> RawBatch:
        """Swap loaded samples (x0, y) inside the group so that each sits where most of its path is."""
        index = self._first_index + plan.positions[plan.own]
        if plan.swap is None:
            assert (samples.index == index).all()
            return samples
        swap, device = plan.swap, self.comm.device
        flat = np.concatenate([samples.x0.reshape(len(index), -1), samples.y[:, None].astype(np.float32)], axis=1)
        rows = torch.from_numpy(flat[swap.send_rows]).to(device)
        received, work = self.wire.send(rows, swap.send_splits.tolist(), swap.receive_splits.tolist(), "seats")
        self.wire.wait(work)
        values = received.cpu().numpy()[swap.order]
        x0 = values[:, :-1].reshape(len(index), *samples.x0.shape[1:])
        return RawBatch(index=index, x0=np.ascontiguousarray(x0), y=values[:, -1].astype(np.int64))
