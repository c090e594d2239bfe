"""Plans of the next step, made on a thread while the device computes the present one.

The plans of a step depend on the routes of its samples, which are known only after the update of the weights before it. At a
small learning rate an update rarely changes the routes. A step is therefore planned from the routes of the step before it. Its
plans are used if the new routes are the same for all tasks that the plans depend on, and are made again otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sdit.expert_parallel.device_plan import PackedPlan, pack_plan
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.step_plan import MicroStepPlan, RankBatch, StepSamples, plan_micro_step
from sdit.expert_parallel.traffic_model import AssignmentKind

MIN_CHANCE = 0.25  # of a plan to be used


@dataclass(frozen=True)
class PlanInputs:
    """All that the plans of a step depend on."""

    routes: RoutingTable
    step: StepSamples
    placement: ExpertPlacement


@dataclass(frozen=True)
class ReadyPlan:
    """The plan of a micro-step, and its index arrays in host memory."""

    plan: MicroStepPlan
    packed: PackedPlan


def make_plan(inputs: PlanInputs, rank_batch: RankBatch, micro_step: int, assignment: AssignmentKind) -> ReadyPlan:
    """Return this rank's plan of a micro-step."""
    routes, step, placement = inputs.routes, inputs.step, inputs.placement
    plan = plan_micro_step(routes, step, placement, rank_batch, micro_step, assignment)
    return ReadyPlan(plan, pack_plan(plan, placement, rank_batch.groups.ep_rank_of(rank_batch.rank)))


class PlanAhead:
    """Makes the plans of the next step ahead, without a capacity limit. A plan for other routes is never returned."""

    def __init__(self, rank_batch: RankBatch, assignment: AssignmentKind) -> None:
        self._rank_batch, self._assignment = rank_batch, assignment
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
        self._prepared: Future[tuple[PlanInputs, list[ReadyPlan]]] | None = None
        self._last_routes: RoutingTable | None = None

    def prepare(self, next_step: Callable[[], StepSamples], routes: RoutingTable, placement: ExpertPlacement) -> None:
        """Start to plan the next step from the present `routes`, unless the plans would probably not be used."""
        before, self._last_routes = self._last_routes, routes
        self._prepared = self._thread.submit(self._make, next_step, before, routes, placement)

    def take(self, inputs: PlanInputs) -> list[ReadyPlan] | None:
        """Return the plans of all micro-steps of a step, or None if they were not made or the routes have changed."""
        if self._prepared is None or inputs.step.kept is not None:
            return None
        made_for, plans = self._prepared.result()
        same_step = made_for.step.first_index == inputs.step.first_index and made_for.placement is inputs.placement
        if not plans or not same_step or not np.array_equal(made_for.step.tasks, inputs.step.tasks):
            return None
        tasks = [ready.plan.tasks for ready in plans]
        return plans if same_routes(made_for.routes, inputs.routes, tasks) else None

    def _make(
        self, next_step: Callable[[], StepSamples], before: RoutingTable | None, routes: RoutingTable,
        placement: ExpertPlacement,
    ) -> tuple[PlanInputs, list[ReadyPlan]]:  # fmt: skip
        inputs = PlanInputs(routes, next_step(), placement)
        micro_steps = range(self._rank_batch.batch.accumulation)
        first_index, tasks = inputs.step.first_index, inputs.step.tasks
        own = [tasks[self._rank_batch.group_positions(micro_step, first_index)] for micro_step in micro_steps]
        if before is None or chance_of_same_routes(before, routes, own) < MIN_CHANCE:
            return inputs, []
        return inputs, [make_plan(inputs, self._rank_batch, each, self._assignment) for each in micro_steps]


def chance_of_same_routes(before: RoutingTable, routes: RoutingTable, tasks: Sequence[np.ndarray]) -> float:
    """Return the chance that the next update keeps the routes of all `tasks`, if it changes as large a share as the last.

    The share is that of the samples, by the weights of the tasks.
    """
    changed = ((before.experts != routes.experts).any(axis=(0, 2)) * routes.weights).mean()
    return float((1 - changed) ** len(np.unique(np.concatenate(tasks))))


def same_routes(a: RoutingTable, b: RoutingTable, tasks: Sequence[np.ndarray]) -> bool:
    """Return whether two tables choose the same experts, in the same order, for all `tasks`."""
    if np.array_equal(a.experts, b.experts):
        return True
    used = np.unique(np.concatenate(tasks))
    return np.array_equal(a.experts[:, used], b.experts[:, used])
