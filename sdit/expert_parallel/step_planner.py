"""The plans of one step after another: which samples full experts drop, the plan of each micro-step, and statistics of both.

N samples of the global batch, P ranks of a group, M experts of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from sdit.config import ModelConfig, ResolvedRun
from sdit.distributed.comm import Comm
from sdit.expert_parallel.capacity import Capacity, dropped_per_block, keep_samples
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.plan_ahead import PlanAhead, PlanInputs, ReadyPlan, make_plan
from sdit.expert_parallel.routing_table import RoutingTable, load_max_over_mean
from sdit.expert_parallel.step_plan import MicroStepPlan, RankBatch, StepSamples
from sdit.expert_parallel.traffic_model import AssignmentKind, rank_work
from sdit.model import experts_need_plan
from sdit.topology import ExpertGroups


@dataclass(frozen=True)
class ExpertStatistics:
    """What the plans of the present step say.

    `loads` (depth, M) is the expected share of the samples that use the expert (empty without gates). `dropped_fraction` of the
    (sample, expert) pairs, `dropped_by_block` (depth,) pairs of this step and `dropped_since_logged` of the steps since the last
    call. `planned_ahead_fraction` is the share of the plans since the last call that were made ahead (None: no plans).
    `load_imbalance` and `rank_imbalance` are the largest over the mean load of experts, and work of ranks.
    """

    loads: np.ndarray
    load_imbalance: float
    rank_imbalance: float
    dropped_fraction: float
    dropped_by_block: list[int]
    dropped_since_logged: list[int]
    planned_ahead_fraction: float | None


class StepPlanner:
    """Plans micro-steps if experts are sharded, their capacity is limited, or they need a plan (`is_planned`).

    Otherwise it does nothing. `table` returns the routes of all tasks. It is called only if they are needed.
    """

    def __init__(
        self, model: ModelConfig, assignment: AssignmentKind, rank_batch: RankBatch, seed: int,
        table: Callable[[], RoutingTable], needs_plan: bool = False,
    ) -> None:  # fmt: skip
        self._config, self._assignment, self._rank_batch, self._table = model, assignment, rank_batch, table
        self._train_capacity, self._eval_capacity = (
            None if factor is None else Capacity(factor, model.experts.drop_policy, seed)
            for factor in (model.experts.capacity_factor, model.experts.capacity_factor_eval)
        )
        has_capacity = self._train_capacity is not None or self._eval_capacity is not None
        self.is_planned = model.variant == "switch" and (rank_batch.groups.size > 1 or has_capacity or needs_plan)
        self._capacity = self._train_capacity
        self._ahead = PlanAhead(rank_batch, assignment) if self.is_planned and self._capacity is None else None
        self._ready: list[ReadyPlan] | None = None
        self._plans, self._plans_ahead = 0, 0  # since the last call of `statistics`
        self._step = StepSamples(0, np.empty(0, dtype=np.int64))
        self._computed: list[tuple[MicroStepPlan, ExpertPlacement]] = []  # the micro-steps of the present step
        self._dropped = np.zeros(model.depth, dtype=np.int64)

    @classmethod
    def of(cls, run: ResolvedRun, comm: Comm, dtype: torch.dtype, table: Callable[[], RoutingTable]) -> StepPlanner:
        """Return the planner of this rank of a run whose products have this dtype."""
        config = run.config
        rank_batch = RankBatch(run.batch, ExpertGroups(comm.world, run.expert_parallel), comm.rank)
        needs_plan = experts_need_plan(config.model, comm.device, dtype)
        return cls(config.model, config.parallel.seating, rank_batch, config.seed, table, needs_plan)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Use `capacity_factor_eval` inside the `with`. Plans inside are not counted."""
        self._capacity, counted = self._eval_capacity, (self._plans, self._plans_ahead)
        try:
            yield
        finally:
            self._capacity, (self._plans, self._plans_ahead) = self._train_capacity, counted

    def begin(self, first_index: int, times: np.ndarray) -> None:
        """Begin a global batch whose samples have times (N,); `first_index` is the run index of the first."""
        self._computed = []
        self._step = StepSamples(first_index, np.empty(0, dtype=np.int64))
        if not self.is_planned:
            return
        tasks = gate_tasks(times, self._config.timesteps)
        kept = None if self._capacity is None else keep_samples(self._table(), tasks, first_index, self._capacity)
        self._step = StepSamples(first_index, tasks, kept)

    def count_dropped(self) -> None:
        """Count what the present batch drops for `statistics`."""
        if self._step.kept is not None:
            self._dropped += dropped_per_block(self._step.kept)

    def prepare(self, first_index: int, times: Callable[[], np.ndarray], placement: ExpertPlacement) -> None:
        """Start to plan the next step on a thread. `times` returns the times (N,) of its samples; it is called there."""
        if self._ahead is not None:
            self._ahead.prepare(
                lambda: StepSamples(first_index, gate_tasks(times(), self._config.timesteps)), self._table(), placement
            )

    def plan(self, micro_step: int, placement: ExpertPlacement) -> ReadyPlan:
        """Return this rank's plan of a micro-step."""
        inputs = PlanInputs(self._table(), self._step, placement)
        if micro_step == 0:
            self._ready = None if self._ahead is None else self._ahead.take(inputs)
        self._plans += 1
        if self._ready is not None:
            self._plans_ahead += 1
            ready = self._ready[micro_step]
        else:
            ready = make_plan(inputs, self._rank_batch, micro_step, self._assignment)
        self._computed.append((ready.plan, placement))
        return ready

    def own_index(self, plan: MicroStepPlan) -> np.ndarray:
        """Return the run indices (B,) of the samples that this rank computes."""
        return self._step.first_index + plan.positions[plan.own]

    def statistics(self) -> ExpertStatistics:
        """Return the statistics of the present step, and count dropped pairs from zero again."""
        kept = self._step.kept
        dropped = np.zeros_like(self._dropped) if kept is None else dropped_per_block(kept)
        share = 0.0 if kept is None else float(dropped.sum()) / kept.size
        since, self._dropped = self._dropped.tolist(), np.zeros_like(self._dropped)
        ahead = self._plans_ahead / self._plans if self._plans else None
        self._plans, self._plans_ahead = 0, 0
        loads, imbalance, work = np.empty((0, 0)), 1.0, 1.0
        if self._config.variant == "switch":
            loads = self._table().loads
            imbalance = float((loads.max(1) / loads.mean(1)).max())
        if self.is_planned:
            by_rank = [rank_work(plan.experts, placement, plan.kept).sum(axis=0) for plan, placement in self._computed]
            work = float(load_max_over_mean(np.sum(by_rank, axis=0)[None]).max())
        return ExpertStatistics(loads, imbalance, work, share, dropped.tolist(), since, ahead)


def gate_tasks(times: np.ndarray, timesteps: int) -> np.ndarray:
    """Gate task (N,) of times: themselves, or floor(t T) of continuous ones, as the model computes it."""
    if times.dtype.kind != "f":
        return times
    return np.minimum((times.astype(np.float32) * np.float32(timesteps)).astype(np.int64), timesteps - 1)
