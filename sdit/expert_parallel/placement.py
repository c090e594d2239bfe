"""Which rank of an expert-parallel group holds which expert, and what it takes to change that.

M experts, P ranks per group with M / P experts of every block each, T tasks, N samples, k experts used per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from sdit.expert_parallel.assignment import assign_samples
from sdit.expert_parallel.routing_table import RoutingTable, exact_loads, expert_counts, hottest

PlacementKind = Literal["index", "balanced", "path"]
# Aim of the path placement for expected loads; it leaves room for the scatter of real batches below 1.3.
TARGET_IMBALANCE = 1.25


@dataclass(frozen=True)
class ExpertPlacement:
    """Where the experts of every block are.

    `expert_to_rank` (depth, M) is the rank, inside the group of `ranks` = P, that owns the expert. `replicated` (depth, M) bool
    marks experts whose weights every rank of the group receives, so that no sample travels to them.
    """

    expert_to_rank: np.ndarray
    replicated: np.ndarray
    ranks: int

    @property
    def experts_of_rank(self) -> np.ndarray:
        """(depth, P, M / P) ids of the experts that each rank owns, rising."""
        return np.argsort(self.expert_to_rank, axis=1, kind="stable").reshape(len(self.expert_to_rank), self.ranks, -1)


def ranks_needed(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth, N, P) bool: the sample uses an expert that only rank p can serve, for `experts` (depth, N, k)."""
    block = np.arange(len(experts))[:, None, None]
    wanted = ~placement.replicated[block, experts]
    if kept is not None:
        wanted &= kept
    needed = np.zeros((*experts.shape[:2], placement.ranks), dtype=bool)
    depth, sample, choice = np.nonzero(wanted)
    needed[depth, sample, placement.expert_to_rank[depth, experts[depth, sample, choice]]] = True
    return needed


def path_need(experts: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """(T, P) int64: in how many blocks a task (depth, T, k) needs rank p; what `assign_samples` decides by."""
    return ranks_needed(experts, placement).sum(axis=0)


def expected_load_imbalance(loads: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """(depth,) expected largest over mean work of the ranks. Replicated experts count as spread evenly."""
    work = _rank_loads(np.where(placement.replicated, 0, loads), placement.expert_to_rank, placement.ranks)
    work = work + np.where(placement.replicated, loads, 0).sum(axis=1, keepdims=True) / placement.ranks
    return work.max(axis=1) / work.mean(axis=1)


def place_experts(
    kind: PlacementKind,
    routes: RoutingTable,
    ranks: int,
    replicated: np.ndarray | None = None,
    limit: float = TARGET_IMBALANCE,
) -> np.ndarray:
    """(depth, M) rank of each expert.

    index: in order of their ids. balanced: equal expected load. path: neighbours in time together, which keeps paths
    local, unless that loads a rank beyond `limit` x the mean (over the blocks). Load and traffic of `replicated` experts
    (None: the k hottest of each block) do not depend on their rank.
    """
    assert routes.count % ranks == 0, (routes.count, ranks)
    by_index = np.tile(np.arange(routes.count) // (routes.count // ranks), (routes.depth, 1))
    if kind == "index" or ranks == 1:
        return by_index
    loads = exact_loads(routes.experts, routes.count)
    replicated = hottest(loads, routes.top_k) if replicated is None else replicated
    if kind == "balanced":
        return _largest_first(np.where(replicated, 0, loads), ranks)
    expert_to_rank = np.empty_like(by_index)
    np.put_along_axis(expert_to_rank, np.argsort(_mean_task(routes), axis=1, kind="stable"), by_index, axis=1)
    return _level(routes, ExpertPlacement(expert_to_rank, replicated, ranks), limit)


def _rank_loads(loads: np.ndarray, expert_to_rank: np.ndarray, ranks: int) -> np.ndarray:
    """(depth, P) sum of the loads (depth, M) on each rank."""
    return np.stack([np.bincount(where, load, ranks) for where, load in zip(expert_to_rank, loads, strict=True)])


def _mean_task(routes: RoutingTable) -> np.ndarray:
    """(depth, M) mean task of those that use the expert; infinite for unused experts, which so come last."""
    unit = routes.experts + np.arange(routes.depth)[:, None, None] * routes.count
    task = np.broadcast_to(np.arange(routes.tasks)[None, :, None], unit.shape)
    total = np.bincount(unit.ravel(), task.ravel(), minlength=routes.depth * routes.count).reshape(routes.depth, -1)
    users = expert_counts(routes.experts, routes.count)
    return np.where(users > 0, total / np.maximum(users, 1), np.inf)


def _largest_first(loads: np.ndarray, ranks: int) -> np.ndarray:
    """(depth, M) ranks: falling by load, each expert to the least loaded rank that owns too few (Graham 1969, LPT)."""
    depth, count = loads.shape
    blocks = np.arange(depth)
    expert_to_rank = np.empty((depth, count), dtype=np.int64)
    work, free = np.zeros((depth, ranks)), np.full((depth, ranks), count // ranks)
    for expert in np.argsort(-loads, axis=1, kind="stable").T:
        rank = np.where(free > 0, work, np.inf).argmin(axis=1)
        expert_to_rank[blocks, expert] = rank
        work[blocks, rank] += loads[blocks, expert]
        free[blocks, rank] -= 1
    return expert_to_rank


def _level(routes: RoutingTable, placement: ExpertPlacement, limit: float) -> np.ndarray:
    """(depth, M) ranks after swapping experts, worst block first, until the mean imbalance is within `limit`."""
    loads = exact_loads(routes.experts, routes.count)
    expert_to_rank, imbalance = placement.expert_to_rank.copy(), expected_load_imbalance(loads, placement)
    if imbalance.mean() <= limit:
        return expert_to_rank
    affinity = _affinity(routes, placement)
    own = np.where(placement.replicated, 0, loads)
    shared = (loads - own).sum(axis=1) / placement.ranks
    while imbalance.mean() > limit:
        block = int(imbalance.argmax())
        swap = _best_swap(
            expert_to_rank[block],
            own[block],
            affinity[block],
            limit * loads[block].sum() / placement.ranks - shared[block],
        )
        if swap is None:
            imbalance[block] = 0  # as level as it gets: leave it out
            continue
        expert_to_rank[block, swap] = expert_to_rank[block, swap[::-1]]
        work = np.bincount(expert_to_rank[block], own[block], placement.ranks) + shared[block]
        imbalance[block] = work.max() / work.mean()
    return expert_to_rank


def _affinity(routes: RoutingTable, placement: ExpertPlacement) -> np.ndarray:
    """(depth, M, P) share of tasks that use the expert and are assigned to rank p by path; 0 for replicated experts."""
    samples = -(-routes.tasks // placement.ranks) * placement.ranks
    tasks = np.arange(samples) * routes.tasks // samples
    assigned_rank = assign_samples(tasks, path_need(routes.experts, placement), samples // placement.ranks)
    affinity = np.zeros((routes.depth, routes.count, placement.ranks))
    for choice in range(routes.top_k):
        np.add.at(
            affinity, (np.arange(routes.depth)[:, None], routes.experts[:, tasks, choice], assigned_rank), 1 / samples
        )
    affinity[placement.replicated] = 0
    return affinity


def _best_swap(expert_to_rank: np.ndarray, loads: np.ndarray, affinity: np.ndarray, target: float) -> list[int] | None:
    """The two experts whose swap lightens the block's most loaded rank at the least loss of affinity; None: no swap does.

    Relief counts down to `target`, the load that is light enough.
    """
    work = np.bincount(expert_to_rank, loads, affinity.shape[1])
    full = int(work.argmax())
    inside, outside = np.flatnonzero(expert_to_rank == full), np.flatnonzero(expert_to_rank != full)
    there = expert_to_rank[outside]
    shifted = loads[inside][:, None] - loads[outside][None]
    fuller = np.maximum(work[full] - shifted, work[there][None] + shifted)
    relief = np.minimum(work[full] - fuller, work[full] - target)
    loss = affinity[inside, full][:, None] + affinity[outside, there][None]
    loss = loss - affinity[inside][:, there] - affinity[outside, full][None]
    smallest = 1e-9  # loads are multiples of 1 / T: less is rounding
    price = np.where(relief > smallest, (loss + smallest) / np.maximum(relief, smallest), np.inf)
    i, j = np.unravel_index(price.argmin(), price.shape)
    return None if np.isinf(price[i, j]) else [int(inside[i]), int(outside[j])]


class Move(NamedTuple):
    """One expert of one block that changes its rank inside the group."""

    block: int
    expert: int
    source: int
    target: int


def replacement_moves(old: np.ndarray, new: np.ndarray) -> list[Move]:
    """All experts whose rank differs between two placements (depth, M), in order of block and expert."""
    changed = np.nonzero(old != new)
    columns = (*changed, old[changed], new[changed])
    return [Move(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def relabel(old: np.ndarray, new: np.ndarray, ranks: int) -> np.ndarray:
    """Placement `new` (depth, M), its ranks renamed in all blocks alike so that the fewest experts move from `old`."""
    overlap = np.zeros((ranks, ranks), dtype=np.int64)
    np.add.at(overlap, (new, old), 1)
    return linear_sum_assignment(-overlap)[1][new]
