"""Expert parallelism of one run: placement, plans, capacity, migration and statistics behind one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdit.config import ModelConfig, ParallelConfig
from sdit.contracts import ForwardPass, RawBatch
from sdit.distributed.comm import Comm
from sdit.distributed.deepspeed_internals import make_expert_groups
from sdit.expert_parallel.all_to_all import MODES, ExpertGroup, TrafficCounter
from sdit.expert_parallel.capacity import Capacity, dropped_per_block, keep_samples
from sdit.expert_parallel.device_plan import DevicePlan, to_device
from sdit.expert_parallel.dispatcher import PlannedPass, SharedTaskPass
from sdit.expert_parallel.migration import MigratableState, migrate
from sdit.expert_parallel.placement import ExpertPlacement, replacement_moves
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, load_max_over_mean, routing_table
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.step_plan import MicroStepPlan, plan_micro_step
from sdit.expert_parallel.strategy import choose_exchange, decide_placement, worth_moving
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts, expert_parameters, rank_work
from sdit.model import DiffusionTransformer
from sdit.model.dit import Router
from sdit.model.moe.experts import Experts, build_experts
from sdit.model.moe.local import LocalDispatcher
from sdit.topology import BatchPlan, ExpertGroups

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Rebalanced:
    """A change of placement: why, and how many experts moved to another rank. Replicas may change without a move."""

    reason: str
    experts_moved: int


@dataclass(frozen=True)
class ExpertStatistics:
    """What the plans of the present step say.

    `loads` (depth, M) is the share of the tasks that use the expert (empty without gates). `dropped_fraction` of the
    (sample, expert) pairs, `dropped_by_block` (depth,) pairs of this step and `dropped_since_logged` of the steps since the last
    call. `load_imbalance` and `rank_imbalance` are the largest over the mean load of experts, and work of ranks.
    """

    loads: np.ndarray
    load_imbalance: float
    rank_imbalance: float
    dropped_fraction: float
    dropped_by_block: list[int]
    dropped_since_logged: list[int]


class ExpertParallel:
    """Everything that sharded experts and limited capacity add to a run. For a model without gates it does nothing.

    The trainer calls `begin_step`, `rebalance_if_due` and `begin_micro_step`; the model calls `forward_pass`.
    """

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, batch: BatchPlan, comm: Comm, ranks: int, element_bytes: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.ranks = ranks
        self._config, self._parallel, self._batch, self._comm = model, parallel, batch, comm
        self._groups = ExpertGroups(comm.world, ranks)
        self.traffic = TrafficCounter(comm.device)
        ep_rank = self._groups.ep_rank_of(comm.rank)
        process_group = make_expert_groups(ranks) if ranks > 1 else None
        self.group = ExpertGroup(process_group, ep_rank, ranks, parallel.overlap, self.traffic)
        count = model.experts.count
        in_order = np.tile(np.arange(count) // (count // ranks), (model.depth, 1))
        self.placement = ExpertPlacement(in_order, np.zeros(in_order.shape, dtype=bool), ranks)
        self.costs = self._unit_costs(element_bytes)
        self._train_capacity, self._eval_capacity = (
            None if factor is None else Capacity(factor, model.experts.drop_policy, seed)
            for factor in (model.experts.capacity_factor, model.experts.capacity_factor_eval)
        )
        self._is_planned = model.variant == "switch" and (
            ranks > 1 or self._train_capacity is not None or self._eval_capacity is not None
        )
        self._local = LocalDispatcher()
        self._model: DiffusionTransformer | None = None
        self._sharded: tuple[ShardedExperts, ...] = ()
        self._placement_is_decided = False
        self._table: RoutingTable | None = None
        self._capacity = self._train_capacity
        self._tasks = np.empty(0, dtype=np.int64)
        self._first_index = 0
        self._kept: np.ndarray | None = None
        self._next_plan: DevicePlan | None = None
        self._work: list[np.ndarray] = []
        self._dropped = np.zeros(model.depth, dtype=np.int64)

    def shard(self, model: DiffusionTransformer, init_weights: Callable[[DiffusionTransformer], None]) -> None:
        """Leave each router of a model on the meta device the experts of this rank, and initialise the weights."""
        self._model = model
        if self.ranks > 1:
            for router, ids_of_rank in zip(model.routers, self.placement.experts_of_rank, strict=True):
                ids = ids_of_rank[self.group.ep_rank]
                router.experts = build_experts(self._config.experts, self._config.width, ids)
        model.to_empty(device=self._comm.device)
        init_weights(model)
        if self.ranks > 1:
            for router in model.routers:
                assert isinstance(router, Router) and isinstance(router.experts, Experts)
                router.experts = ShardedExperts(router.experts, self._config.experts.count, self.ranks)
                self._sharded += (router.experts,)
        if self._is_planned:
            model.dispatcher = self

    def stored(self) -> dict[str, Any] | None:
        """The placement as a checkpoint carries it."""
        if not self._is_planned:
            return None
        owners, replicated = self.placement.expert_to_rank.tolist(), self.placement.replicated.tolist()
        return {"ranks": self.ranks, "place": owners, "at_hand": replicated}  # keys of checkpoint format 1

    def restore(self, stored: dict[str, Any] | None) -> None:
        """Take over a checkpoint's placement if it was made for as many ranks, blocks and experts. Called before `shard`."""
        if stored is None or stored["ranks"] != self.ranks or not self._is_planned:
            return
        owners, replicated = np.array(stored["place"]), np.array(stored["at_hand"], dtype=bool)
        present = self.placement.expert_to_rank
        if owners.shape != present.shape or replicated.shape != present.shape:
            return
        if (np.sort(owners) != np.sort(present)).any():
            return
        self.placement = ExpertPlacement(owners, replicated, self.ranks)
        self._placement_is_decided = True

    @property
    def table(self) -> RoutingTable:
        """Chosen experts and gates of all tasks at the weights that the step began with, on the host.

        The gates are computed once per step, and only if something needs them.
        """
        if self._table is None:
            assert self._model is not None
            self._table = routing_table(self._model)
        return self._table

    def forget(self) -> None:
        """Drop what was derived from weights that are no longer there."""
        self._table, self._next_plan = None, None

    def begin_step(self, first_index: int, times: np.ndarray) -> None:
        """Begin a step on the global batch whose samples have times (N,); `first_index` is the run index of the first."""
        self.forget()
        self._begin(first_index, times)
        if self._kept is not None:
            self._dropped += dropped_per_block(self._kept)

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """Plan batches of held-out samples inside the `with`, under `capacity_factor_eval`.

        The value is called at the start of every global batch, as `begin_step` is. The routing table is that of the weights
        at the first batch. Traffic inside is not counted.
        """
        self.forget()
        self._capacity = self._eval_capacity
        try:
            yield self._begin
        finally:
            self._capacity = self._train_capacity
            self.forget()
            self.traffic.forget()

    def _begin(self, first_index: int, times: np.ndarray) -> None:
        self._first_index, self._kept, self._work = first_index, None, []
        if not self._is_planned:
            return
        self._tasks = gate_tasks(times, self._config.timesteps)
        if self._capacity is not None:
            self._kept = keep_samples(self.table, self._tasks, first_index, self._capacity)

    def begin_micro_step(self, micro_step: int, samples: RawBatch) -> RawBatch:
        """Plan the micro-step, exchange samples inside the group, and return the samples that this rank computes."""
        if not self._is_planned:
            return samples
        plan = plan_micro_step(
            self.table, self._tasks, self._kept, self.placement, self._batch, self._groups, self._comm.rank, micro_step,
            self._first_index, self._parallel.seating,
        )  # fmt: skip
        self._next_plan = to_device(plan, self.placement, self.group.ep_rank, self._comm.device)
        self._work.append(rank_work(plan.experts, self.placement, plan.kept))
        return self._exchange_samples(plan, samples)

    def forward_pass(self, task: torch.Tensor) -> ForwardPass:
        """Return the pass of the micro-step that was begun. Without one (sampling) all samples share a task."""
        plan, self._next_plan = self._next_plan, None
        if plan is not None:
            # A block that is computed again in backward would prefetch in the wrong direction.
            prefetches = self._parallel.overlap and self._parallel.activation_checkpointing == "none"
            return PlannedPass(self.group, plan, self._sharded if prefetches else ())
        assert not torch.is_grad_enabled(), "no micro-step was begun"
        return SharedTaskPass(self.group, task) if self.ranks > 1 else self._local.forward_pass(task)

    def rebalance_if_due(self, images_seen: int, state: MigratableState) -> Rebalanced | None:
        """Reconsider owners and replicas at the start of a run and at the configured intervals. Move experts if it pays."""
        if self.ranks == 1:
            return None
        is_first, self._placement_is_decided = not self._placement_is_decided, True
        placement_due = is_first or self._is_due(images_seen, self._parallel.placement_refresh_images)
        if not placement_due and not self._is_due(images_seen, self._parallel.exchange_refresh_images):
            return None
        better = self.better_placement(placement_due, is_first)
        if better is None:
            return None
        placement, reason = better
        are_zero = images_seen == 0 and self._config.experts.kind == "linear"
        return Rebalanced(reason, self.adopt(placement, None if are_zero else state))

    def adopt(self, placement: ExpertPlacement, state: MigratableState | None) -> int:
        """Change the placement on all ranks, and return how many experts moved. The numbers of the run do not change.

        `state` None: all experts, their moments and averages are still zero, so that only their ids move.
        """
        moved = len(replacement_moves(self.placement.expert_to_rank, placement.expert_to_rank))
        self.placement = placement
        if moved and state is not None:
            migrate(self._comm, state, self._rename)
        elif moved:
            self._rename()
        return moved

    def better_placement(self, placement_due: bool, is_first: bool) -> tuple[ExpertPlacement, str] | None:
        """A better placement for the present gates and the reason, or None.

        If `is_first`, the run starts or has changed its layout, and the cost of moving experts does not count.
        """
        config, parallel = self._config, self._parallel
        traffic = TrafficModel(self.table, self.ranks, self._batch.micro_batch, parallel.seating)
        best = now = choose_exchange(parallel.exchange, traffic, self.placement.expert_to_rank, self.costs)
        if placement_due and parallel.placement != "index":
            owners = self.placement.expert_to_rank
            then = decide_placement(parallel.placement, parallel.exchange, traffic, self.costs, owners)
            micro_steps = parallel.placement_refresh_images // self._batch.chunk
            if is_first or worth_moving(now, then, _parameters_of_expert(config), micro_steps):
                best = then
        placement = self._agree(best.placement)
        same = (placement.expert_to_rank == self.placement.expert_to_rank).all()
        same = same and (placement.replicated == self.placement.replicated).all()
        return None if same else (placement, best.reason)

    def statistics(self) -> ExpertStatistics:
        """Return the statistics of the present step, and count dropped pairs from zero again."""
        dropped = np.zeros_like(self._dropped) if self._kept is None else dropped_per_block(self._kept)
        share = 0.0 if self._kept is None else float(dropped.sum()) / self._kept.size
        since, self._dropped = self._dropped.tolist(), np.zeros_like(self._dropped)
        loads, imbalance, work = np.empty((0, 0)), 1.0, 1.0
        if self._config.variant == "switch":
            loads = exact_loads(self.table.experts, self.table.count)
            imbalance = float((loads.max(1) / loads.mean(1)).max())
        if self._is_planned:
            work = float(load_max_over_mean(np.sum([w.sum(axis=0, keepdims=True) for w in self._work], axis=0)).max())
        return ExpertStatistics(loads, imbalance, work, share, dropped.tolist(), since)

    def take_traffic(self) -> tuple[float, ...]:
        """Bytes that this rank sent since the last call, in the order of MODES, and seconds it waited for transfers."""
        sizes, seconds = self.traffic.take()
        return (*(float(sizes.get(mode, 0)) for mode in MODES), seconds)

    @property
    def is_planned(self) -> bool:
        """Whether micro-steps are planned: experts are sharded, or their capacity is limited."""
        return self._is_planned

    def _is_due(self, images_seen: int, every_images: int) -> bool:
        return images_seen // every_images > (images_seen - self._batch.global_batch) // every_images

    def _agree(self, placement: ExpertPlacement) -> ExpertPlacement:
        """Rank 0's placement on all ranks. A tie that ranks break differently would hang the exchange."""
        owners, replicated = self._comm.from_first([placement.expert_to_rank.tolist(), placement.replicated.tolist()])
        return ExpertPlacement(np.array(owners), np.array(replicated, dtype=bool), self.ranks)

    def _rename(self) -> None:
        for experts, ids_of_rank in zip(self._sharded, self.placement.experts_of_rank, strict=True):
            experts.set_ids(ids_of_rank[self.group.ep_rank].tolist())

    def _exchange_samples(self, plan: MicroStepPlan, samples: RawBatch) -> RawBatch:
        """Send loaded samples (x0, y) to the ranks of the group that compute them."""
        index = self._first_index + plan.positions[plan.own]
        exchange = plan.sample_exchange
        if exchange is None:
            assert (samples.index == index).all()
            return samples
        flat = np.concatenate([samples.x0.reshape(len(index), -1), samples.y[:, None].astype(np.float32)], axis=1)
        rows = torch.from_numpy(flat[exchange.send_rows]).to(self._comm.device)
        splits = exchange.send_splits.tolist(), exchange.receive_splits.tolist()
        received, work = self.group.send(rows, *splits, "samples")
        self.group.wait(work)
        values = received.cpu().numpy()[exchange.order]
        x0 = values[:, :-1].reshape(len(index), *samples.x0.shape[1:])
        return RawBatch(index=index, x0=np.ascontiguousarray(x0), y=values[:, -1].astype(np.int64))

    def _unit_costs(self, element_bytes: int) -> UnitCosts:
        forwards = 1 if self._parallel.activation_checkpointing == "none" else 2
        row_bytes = self._config.tokens * self._config.width * element_bytes
        return UnitCosts(row_bytes, _parameters_of_expert(self._config) * element_bytes, self.ranks, forwards)


def gate_tasks(times: np.ndarray, timesteps: int) -> np.ndarray:
    """Gate task (N,) of times: themselves, or floor(t T) of continuous ones, as the model computes it."""
    if times.dtype.kind != "f":
        return times
    return np.minimum((times.astype(np.float32) * np.float32(timesteps)).astype(np.int64), timesteps - 1)


def _parameters_of_expert(model: ModelConfig) -> int:
    return expert_parameters(model.experts.kind, model.width, int(model.width * model.experts.mlp_ratio))
