"""Laws of experts with limited capacity."""

from __future__ import annotations

import math

import numpy as np
import pytest
from learned_gates import prior_routes, random_routes

from sdit.expert_parallel.capacity import Capacity, capacity_limit, dropped_per_block, keep_samples
from sdit.expert_parallel.routing_table import RoutingTable, expert_counts

POLICIES = ("gate", "position", "random")


def _case(seed: int, samples: int = 96) -> tuple[RoutingTable, np.ndarray]:
    rng = np.random.default_rng(seed)
    routes = random_routes(rng, depth=3, count=6, top_k=2, tasks=40)
    return routes, rng.integers(0, 40, samples)


def test_the_limit_is_the_ceiling_of_the_decimal_as_written() -> None:
    assert capacity_limit(1.1, 110, 2, 2) == 121  # 1.1 * 110 in floats is a little more than 121
    assert capacity_limit(1.0, 10, 2, 3) == 7
    assert capacity_limit(0.01, 10, 1, 10) == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 1.3])
def test_an_expert_serves_the_limit_or_all_that_asked(policy: str, factor: float) -> None:
    routes, tasks = _case(1)
    kept = keep_samples(routes, tasks, 0, Capacity(factor, policy))  # type: ignore[arg-type]
    experts = routes.experts[:, tasks]
    asked, served = expert_counts(experts, 6), expert_counts(experts, 6, kept)
    assert (served == np.minimum(asked, capacity_limit(factor, len(tasks), 2, 6))).all()
    assert not kept.all() or (asked <= served).all()


def test_enough_capacity_drops_nothing() -> None:
    routes, tasks = _case(2)
    assert keep_samples(routes, tasks, 0, Capacity(routes.count / routes.top_k)).all()


def test_the_gate_policy_keeps_the_highest_gates_and_ties_by_lowest_index() -> None:
    routes, tasks = _case(3)
    kept = keep_samples(routes, tasks, 0, Capacity(0.6, "gate"))
    assert not kept.all()
    for block, expert in np.ndindex(3, 6):
        sample, choice = np.nonzero(routes.experts[block, tasks] == expert)
        gate, stays = routes.gates[block, tasks[sample], choice], kept[block, sample, choice]
        ranking = sorted(range(len(sample)), key=lambda i: (-gate[i], sample[i]))
        assert {i for i in range(len(sample)) if stays[i]} == set(ranking[: stays.sum()])


def test_the_position_policy_keeps_the_lowest_indices() -> None:
    routes, tasks = _case(4)
    kept = keep_samples(routes, tasks, 0, Capacity(0.6, "position"))
    for block, expert in np.ndindex(3, 6):
        sample, choice = np.nonzero(routes.experts[block, tasks] == expert)
        stays = kept[block, sample, choice]
        assert (np.diff(stays.astype(int)) <= 0).all()


def test_the_random_policy_is_keyed_by_seed_and_run_index() -> None:
    routes, tasks = _case(5)

    def draw(seed: int, first_index: int) -> np.ndarray:
        return keep_samples(routes, tasks, first_index, Capacity(0.6, "random", seed))

    assert (draw(1, 96) == draw(1, 96)).all()
    assert (draw(1, 96) != draw(2, 96)).any()
    assert (draw(1, 96) != draw(1, 192)).any()


def test_the_random_policy_favours_no_sample() -> None:
    # One expert, half capacity: each of n samples stays in about half of the draws, binomial with sd sqrt(R) / 2.
    samples, draws = 64, 400
    routes = RoutingTable(np.zeros((1, 1, 1), dtype=np.int64), np.ones((1, 1, 1), dtype=np.float32), 1)
    tasks = np.zeros(samples, dtype=np.int64)
    stays = sum(
        keep_samples(routes, tasks, step * samples, Capacity(0.5, "random"))[0, :, 0].astype(int)
        for step in range(draws)
    )
    assert np.abs(stays - draws / 2).max() < 5 * math.sqrt(draws) / 2


def test_dropping_depends_on_the_load_the_prior_makes() -> None:
    routes = prior_routes(4, 16, 2)
    tasks = np.arange(1000)
    experts = routes.experts[:, tasks]
    kept = keep_samples(routes, tasks, 0, Capacity(1.0))
    excess = np.maximum(expert_counts(experts, 16) - 125, 0)  # N k / M = 125
    assert (dropped_per_block(kept) == excess.sum(axis=1)).all() and excess.any()
