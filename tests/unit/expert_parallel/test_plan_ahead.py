"""Plans that were made ahead equal the plans made in the step, and are used only for unchanged routes."""

from __future__ import annotations

from dataclasses import astuple, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.config import ModelConfig
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.plan_ahead import MIN_CHANCE, chance_of_same_routes
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.step_plan import RankBatch
from sdit.expert_parallel.step_planner import StepPlanner
from sdit.topology import BatchPlan, ExpertGroups

DEPTH, COUNT, TASKS, GLOBAL_BATCH, RANKS = 3, 8, 50, 48, 4


def _routes(seed: int) -> RoutingTable:
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((DEPTH, TASKS, COUNT)), axis=2)[:, :, :2]
    return RoutingTable(experts, np.full(experts.shape, 0.5, dtype=np.float32), COUNT)


def _changed(routes: RoutingTable, task: int) -> RoutingTable:
    """The routes with another order of one task's experts in one block."""
    experts = routes.experts.copy()
    experts[1, task] = experts[1, task, ::-1]
    return RoutingTable(experts, routes.gates, COUNT)


def _times(first_index: int) -> np.ndarray:
    return np.random.default_rng(first_index).integers(0, TASKS // 2, GLOBAL_BATCH)


class _Run:
    """A planner whose routing table changes as the test says, and one that never plans ahead."""

    def __init__(self, rank: int, **experts: Any) -> None:
        model = ModelConfig.model_validate(
            {"depth": DEPTH, "timesteps": TASKS, "experts": {"count": COUNT, "top_k": 2, **experts}}
        )
        owners = np.tile(np.arange(COUNT) // (COUNT // RANKS), (DEPTH, 1))
        self.placement = ExpertPlacement(owners, np.zeros(owners.shape, dtype=bool), RANKS)
        self.table = _routes(0)
        batch = RankBatch(BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // (2 * RANKS), 2), ExpertGroups(RANKS, RANKS), rank)
        self.ahead, self.plain = (StepPlanner(model, "path", batch, 0, lambda: self.table) for _ in range(2))

    def step(self, first_index: int) -> None:
        """Take a step; the plans of both planners are equal. Then prepare the next step."""
        for planner in (self.ahead, self.plain):
            planner.begin(first_index, _times(first_index))
        for micro_step in range(2):
            one, other = (each.plan(micro_step, self.placement) for each in (self.ahead, self.plain))
            _assert_equal(one.plan, other.plan)
            _assert_equal(one.packed.to_device(torch.device("cpu")), other.packed.to_device(torch.device("cpu")))
        next_index = first_index + GLOBAL_BATCH
        self.ahead.prepare(next_index, lambda: _times(next_index), self.placement)

    def used(self) -> float | None:
        """The share of the plans since the last call that were made ahead."""
        return self.ahead.statistics().planned_ahead_fraction


def _assert_equal(a: Any, b: Any) -> None:
    if is_dataclass(a):
        a, b = astuple(a), astuple(b)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            _assert_equal(one, other)
    elif isinstance(a, np.ndarray | torch.Tensor):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
    else:
        assert a == b


@pytest.mark.parametrize("rank", range(RANKS))
def test_plans_made_ahead_equal_those_of_the_step(rank: int) -> None:
    run = _Run(rank)
    for step in range(4):
        run.step(step * GLOBAL_BATCH)
    assert (
        run.used() == 0.5
    )  # the second table shows how many routes an update changes; the third step is prepared then


def test_a_changed_route_of_the_batch_is_planned_again() -> None:
    run = _Run(0)
    for step in range(3):
        run.step(step * GLOBAL_BATCH)
    assert run.used() == pytest.approx(1 / 3)
    run.table = _changed(run.table, int(_times(3 * GLOBAL_BATCH)[0]))
    run.step(3 * GLOBAL_BATCH)
    assert run.used() == 0


def test_a_changed_route_of_other_tasks_changes_nothing() -> None:
    run = _Run(0)
    for step in range(3):
        run.step(step * GLOBAL_BATCH)
    run.used()
    run.table = _changed(run.table, TASKS - 1)  # times are below TASKS / 2
    run.step(3 * GLOBAL_BATCH)
    assert run.used() == 1


def test_plans_of_a_validation_are_not_counted() -> None:
    run = _Run(0)
    for step in range(3):
        run.step(step * GLOBAL_BATCH)
    run.used()
    with run.ahead.evaluation():
        run.ahead.begin(0, _times(0))
        run.ahead.plan(0, run.placement)
    run.step(3 * GLOBAL_BATCH)
    assert run.used() == 1


def test_another_placement_or_another_step_is_planned_again() -> None:
    run = _Run(0)
    for step in range(3):
        run.step(step * GLOBAL_BATCH)
    run.used()
    run.placement = ExpertPlacement(run.placement.expert_to_rank[:, ::-1].copy(), run.placement.replicated, RANKS)
    run.step(3 * GLOBAL_BATCH)
    run.step(GLOBAL_BATCH)  # a roll-back
    assert run.used() == 0


def test_a_limited_capacity_is_never_planned_ahead() -> None:
    run = _Run(0, capacity_factor=1.0)
    for step in range(3):
        run.step(step * GLOBAL_BATCH)
    assert run.used() == 0


def test_nothing_is_planned_ahead_while_most_batches_would_change() -> None:
    routes, batch = _routes(0), [np.arange(0, 20), np.arange(10, 30)]
    assert chance_of_same_routes(routes, routes, batch) == 1
    one = chance_of_same_routes(routes, _changed(routes, 40), batch)
    assert one == pytest.approx((1 - 1 / TASKS) ** 30) and one > MIN_CHANCE
    assert chance_of_same_routes(routes, _routes(1), batch) < MIN_CHANCE


def test_a_route_counts_by_how_often_its_task_is_drawn() -> None:
    """A change of a task that is never drawn does not make a plan less likely to be used."""
    weights = np.where(np.arange(TASKS) < TASKS // 2, 2.0, 0.0)
    before, tasks = replace(_routes(0), task_weights=weights), [np.arange(4)]
    never, often = (replace(_changed(before, task), task_weights=weights) for task in (TASKS - 1, 0))
    assert chance_of_same_routes(before, never, tasks) == 1
    assert chance_of_same_routes(before, often, tasks) == pytest.approx((1 - 2 / TASKS) ** 4)
