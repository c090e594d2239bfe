"""Laws of seating: equal counts, least traffic, nobody moves for nothing, and the swap delivers it."""

from __future__ import annotations

import numpy as np
import pytest
from learned_gates import prior_routes
from scipy.optimize import linear_sum_assignment

from sdit.expert_parallel.assignment import assign_samples, plan_sample_exchange
from sdit.expert_parallel.placement import ExpertPlacement, path_need, place_experts
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, hottest


def _optimum(need: np.ndarray, per_rank: int) -> int:
    """Most path blocks (n, P) that any assignment keeps at home: samples are assigned to n single places."""
    places = np.repeat(need, per_rank, axis=1)
    row, column = linear_sum_assignment(-places)
    return int(places[row, column].sum())


@pytest.mark.parametrize("seed", range(60))
def test_no_assignment_is_better_for_any_costs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, per_rank, tasks = int(rng.integers(1, 9)), int(rng.integers(1, 17)), int(rng.integers(1, 80))
    need = rng.integers(0, int(rng.integers(1, 29)) + 1, (tasks, ranks))
    task = rng.integers(0, tasks, ranks * per_rank)
    assigned = assign_samples(task, need, per_rank, rng.permutation(np.arange(len(task)) % ranks))
    assert (np.bincount(assigned, minlength=ranks) == per_rank).all()
    assert need[task, assigned].sum() == _optimum(need[task], per_rank)


@pytest.mark.parametrize("hot", [0, 2, 4])
@pytest.mark.parametrize("kind", ["index", "path"])
def test_no_assignment_is_better_on_the_routes_of_the_prior(kind: str, hot: int, learned: RoutingTable) -> None:
    for routes, ranks, per_rank in ((learned, 4, 64), (prior_routes(28, 64, 4), 8, 64)):
        replicated = hottest(exact_loads(routes.experts, routes.count), hot)
        placement = ExpertPlacement(place_experts(kind, routes, ranks, replicated), replicated, ranks)  # type: ignore[arg-type]
        need = path_need(routes.experts, placement)
        task = np.random.default_rng(7).integers(0, routes.tasks, ranks * per_rank)
        assert need[task, assign_samples(task, need, per_rank)].sum() == _optimum(need[task], per_rank)


def test_samples_stay_where_they_were_loaded_when_no_rank_is_better() -> None:
    home = np.random.default_rng(0).permutation(np.arange(64) % 8)
    assigned = assign_samples(np.arange(64), np.full((64, 8), 3), 8, home)
    assert (assigned == home).all()


def test_among_equal_samples_those_at_home_stay() -> None:
    rng = np.random.default_rng(1)
    need, task = rng.integers(0, 5, (6, 4)), rng.integers(0, 6, 64)
    home = np.arange(64) % 4
    assigned = assign_samples(task, need, 16, home)
    rows = need[task]
    for here in range(4):
        left = (home == here) & (assigned != here)
        came = (home != here) & (assigned == here)
        same = (rows[left][:, None] == rows[came][None]).all(axis=2)
        assert not same.any()


def test_assignment_is_a_function_of_its_arguments_only() -> None:
    rng = np.random.default_rng(2)
    need, task = rng.integers(0, 9, (50, 8)), rng.integers(0, 50, 256)
    first = assign_samples(task, need, 32)
    assert (first == assign_samples(task.copy(), np.asfortranarray(need), 32)).all()


@pytest.mark.parametrize("seed", range(10))
def test_the_exchange_brings_each_sample_to_its_assigned_rank_in_rising_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, per_rank = int(rng.integers(1, 6)), int(rng.integers(1, 8))
    home = np.arange(ranks * per_rank) % ranks
    assigned = rng.permutation(home)
    swaps = [plan_sample_exchange(home, assigned, ranks, place) for place in range(ranks)]
    mail = [
        np.split(np.flatnonzero(home == p)[swaps[p].send_rows], np.cumsum(swaps[p].send_splits)[:-1])
        for p in range(ranks)
    ]
    for place, swap in enumerate(swaps):
        arrived = [mail[source][place] for source in range(ranks)]
        assert [len(part) for part in arrived] == swap.receive_splits.tolist()
        assert (np.concatenate(arrived)[swap.order] == np.flatnonzero(assigned == place)).all()
        assert swap.send_splits[place] == ((home == place) & (assigned == place)).sum()
