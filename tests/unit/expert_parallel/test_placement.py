"""Laws of placement: equal shares, paths kept local, ranks kept level, and moves that lead from one to the next."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from learned_gates import prior_routes, random_routes

from sdit.expert_parallel.placement import (
    TARGET_IMBALANCE,
    ExpertPlacement,
    PlacementKind,
    expected_load_imbalance,
    experts_moved,
    place_experts,
    relabel,
)
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, hottest

KINDS: tuple[PlacementKind, ...] = ("index", "balanced", "path")


def _nothing(routes: RoutingTable) -> np.ndarray:
    return np.zeros((routes.depth, routes.count), dtype=bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_every_rank_holds_the_same_number_of_experts_of_every_block(kind: PlacementKind, ranks: int) -> None:
    routes = prior_routes(6, 64, 4)
    expert_to_rank = place_experts(kind, routes, ranks)
    assert all((np.bincount(row, minlength=ranks) == 64 // ranks).all() for row in expert_to_rank)
    slots = ExpertPlacement(expert_to_rank, _nothing(routes), ranks).experts_of_rank
    assert (np.sort(slots.reshape(6, 64), axis=1) == np.arange(64)).all()
    for block, rank in np.ndindex(6, ranks):
        assert (expert_to_rank[block, slots[block, rank]] == rank).all()
        assert (np.diff(slots[block, rank]) > 0).all()


def test_placement_by_path_puts_neighbours_in_time_together_and_unused_experts_last() -> None:
    rng = np.random.default_rng(0)
    routes = random_routes(rng, depth=3, count=8, top_k=1, tasks=50)
    routes.experts[1] = rng.choice([1, 4, 6], size=(50, 1))
    expert_to_rank = place_experts("path", routes, 4, _nothing(routes), limit=np.inf)
    for block in range(3):
        users = [np.flatnonzero((routes.experts[block] == expert).any(axis=1)) for expert in range(8)]
        time = np.array([task.mean() if len(task) else np.inf for task in users])
        for low, high in combinations(range(4), 2):
            assert time[expert_to_rank[block] == low].max() <= time[expert_to_rank[block] == high].min()


@pytest.mark.parametrize("hot", [0, 2])
def test_placement_by_path_keeps_the_fullest_rank_within_its_limit(hot: int, learned: RoutingTable) -> None:
    loads = exact_loads(learned.experts, 16)
    replicated = hottest(loads, hot)
    tight = 1.35  # without hot experts at hand the hottest alone is up to 0.62 / 0.5 of a rank's mean
    expert_to_rank = place_experts("path", learned, 4, replicated, limit=tight)
    assert expected_load_imbalance(loads, ExpertPlacement(expert_to_rank, replicated, 4)).mean() <= tight
    free = place_experts("path", learned, 4, replicated, limit=np.inf)
    assert hot or expected_load_imbalance(loads, ExpertPlacement(free, replicated, 4)).mean() > tight


def test_placement_by_path_levels_the_prior_of_many_experts() -> None:
    routes = prior_routes(28, 64, 4)
    loads = exact_loads(routes.experts, 64)
    replicated = hottest(loads, 4)
    imbalance = [
        expected_load_imbalance(
            loads, ExpertPlacement(place_experts("path", routes, 8, replicated, limit), replicated, 8)
        ).mean()
        for limit in (np.inf, TARGET_IMBALANCE)
    ]
    assert imbalance[1] <= TARGET_IMBALANCE < imbalance[0]


def test_an_unreachable_limit_ends_at_swaps_that_no_longer_help() -> None:
    routes = prior_routes(4, 16, 2)
    loads = exact_loads(routes.experts, 16)
    expert_to_rank = place_experts("path", routes, 8, _nothing(routes), limit=1.0)
    for block in range(4):
        work = np.bincount(expert_to_rank[block], loads[block], 8)
        for inside, outside in np.ndindex(16, 16):
            if expert_to_rank[block, inside] != work.argmax() or expert_to_rank[block, outside] == work.argmax():
                continue
            shift = loads[block, inside] - loads[block, outside]
            assert max(work.max() - shift, work[expert_to_rank[block, outside]] + shift) >= work.max() - 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_balanced_placement_is_within_four_thirds_of_the_best_equal_split(seed: int) -> None:
    # 4/3 is Graham's bound for this rule; the best split in equal counts is no better than the one he compares with.
    routes = random_routes(np.random.default_rng(seed), depth=2, count=8, top_k=2, tasks=60)
    loads = exact_loads(routes.experts, 8)
    expert_to_rank = place_experts("balanced", routes, 2, _nothing(routes))
    for row, load in zip(expert_to_rank, loads, strict=True):
        halves = [load[list(half)].sum() for half in combinations(range(8), 4)]
        assert np.bincount(row, load, 2).max() <= 4 / 3 * min(max(half, 2 - half) for half in halves)


@pytest.mark.parametrize("hot", [0, 2])
def test_balanced_placement_levels_learned_routes(hot: int, learned: RoutingTable) -> None:
    loads = exact_loads(learned.experts, 16)
    replicated = hottest(loads, hot)
    imbalance = {
        kind: expected_load_imbalance(
            loads, ExpertPlacement(place_experts(kind, learned, 4, replicated), replicated, 4)
        ).mean()
        for kind in KINDS
    }
    assert imbalance["balanced"] == min(imbalance.values()) < imbalance["index"]


def test_replicated_experts_spread_their_load() -> None:
    routes = prior_routes(4, 16, 2)
    loads = exact_loads(routes.experts, 16)
    everything = ExpertPlacement(place_experts("index", routes, 4), np.ones((4, 16), dtype=bool), 4)
    assert np.allclose(expected_load_imbalance(loads, everything), 1)


@pytest.mark.parametrize("seed", range(5))
def test_relabelled_ranks_need_the_fewest_moves_and_stay_consistent_across_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = (rng.permuted(np.tile(np.arange(12) // 3, (4, 1)), axis=1) for _ in range(2))
    named = relabel(old, new, 4)
    fewest = min((old != np.array(names)[new]).sum() for names in permutations(range(4)))
    assert experts_moved(old, named) == fewest
    assert len(np.unique(np.stack([new.ravel(), named.ravel()]), axis=1).T) == 4


def test_a_renamed_placement_costs_no_move() -> None:
    old = place_experts("path", prior_routes(6, 16, 2), 4)
    assert experts_moved(old, relabel(old, (old + 1) % 4, 4)) == 0
