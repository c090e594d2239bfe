"""The placement of experts on the ranks of an expert-parallel group, and the moves that change it.

M experts of a block, P ranks per group with M / P experts of each block, T tasks, N samples, k experts used per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.expert_parallel.assignment import assign_samples
from sdit.expert_parallel.routing_table import RoutingTable, hottest, sum_over_users

PlacementKind = Literal["index", "balanced", "path"]
# Target of the path placement for expected loads. With it, the imbalance of real batches stays below 1.3.
TARGET_IMBALANCE = 1.25


@dataclass(frozen=True)
class ExpertPlacement:
    """The owner of each expert of each block, and the replicated experts.

    `expert_to_rank` (depth, M) is the rank that owns the expert, inside the group of `ranks` = P. `replicated` (depth, M)
    bool marks experts whose weights each rank of the group receives, so no sample is sent to them.
    """

    expert_to_rank: np.ndarray
    replicated: np.ndarray
    ranks: int

    @property
    def experts_of_rank(self) -> np.ndarray:
        """The ids of the experts that each rank owns, (depth, P, M / P), ascending."""
        blocks, experts = self.expert_to_rank.shape
        order = np.argsort(self.expert_to_rank, axis=1, kind="stable")
        return order.reshape(blocks, self.ranks, experts // self.ranks)


def ranks_needed(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """Return (depth, N, P) bool, True if the sample uses an expert that only rank p can serve. `experts` is (depth, N, k)."""
    block = np.arange(len(experts))[:, None, None]
    wanted = ~placement.replicated[block, experts]
    if kept is not None:
        wanted &= kept
    needed = np.zeros((*experts.shape[:2], placement.ranks), dtype=bool)
    depth, sample, choice = np.nonzero(wanted)
    needed[depth, sample, placement.expert_to_rank[depth, experts[depth, sample, choice]]] = True
    return needed


def path_need(experts: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Return (T, P) int64, the number of blocks in which a task needs rank p, for `experts` (depth, T, k).

    `assign_samples` uses it.
    """
    return ranks_needed(experts, placement).sum(axis=0)


def expected_load_imbalance(loads: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Return the expected max / mean of the ranks' work in each block, (depth,).

    The work of replicated experts is counted as evenly distributed.
    """
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
    """Return the rank of each expert (depth, M).

    index: in the order of the ids. balanced: equal expected load. path: experts of similar tasks on the same rank, so that
    most transfers of a path are saved, unless a rank's load exceeds `limit` x the mean (averaged over the blocks). Load and
    traffic of `replicated` experts (None: the k hottest of each block) do not depend on their rank.
    """
    assert routes.count % ranks == 0, (routes.count, ranks)
    by_index = np.tile(np.arange(routes.count) // (routes.count // ranks), (routes.depth, 1))
    if kind == "index" or ranks == 1:
        return by_index
    loads = routes.loads
    replicated = hottest(loads, routes.top_k) if replicated is None else replicated
    if kind == "balanced":
        return largest_first(np.where(replicated, 0, loads), ranks)
    expert_to_rank = np.empty_like(by_index)
    np.put_along_axis(expert_to_rank, np.argsort(_mean_task(routes), axis=1, kind="stable"), by_index, axis=1)
    return _level(routes, ExpertPlacement(expert_to_rank, replicated, ranks), limit)


def _rank_loads(loads: np.ndarray, expert_to_rank: np.ndarray, ranks: int) -> np.ndarray:
    """Return (depth, P), the sum of the loads (depth, M) on each rank."""
    return np.stack([np.bincount(where, load, ranks) for where, load in zip(expert_to_rank, loads, strict=True)])


def _mean_task(routes: RoutingTable) -> np.ndarray:
    """Return (depth, M), the expected task of a sample that uses the expert.

    It is infinite for experts that no sample uses, so they are sorted last.
    """
    used = sum_over_users(routes.experts, routes.count, routes.weights)
    total = sum_over_users(routes.experts, routes.count, np.arange(routes.tasks) * routes.weights)
    return np.divide(total, used, out=np.full(used.shape, np.inf), where=used > 0)


def largest_first(loads: np.ndarray, ranks: int) -> np.ndarray:
    """Return ranks (depth, M): in descending load, each expert goes to the least loaded rank with a free position.

    Source: Graham 1969, LPT.
    """
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
    """Return ranks (depth, M) after experts were swapped, worst block first, until the mean imbalance is within `limit`."""
    loads = routes.loads
    expert_to_rank, imbalance = placement.expert_to_rank.copy(), expected_load_imbalance(loads, placement)
    if imbalance.mean() <= limit:
        return expert_to_rank
    affinity = _affinity(routes, placement)
    own = np.where(placement.replicated, 0, loads)
    shared = (loads - own).sum(axis=1) / placement.ranks
    while imbalance.mean() > limit:
        block = int(imbalance.argmax())
        target = limit * loads[block].sum() / placement.ranks - shared[block]
        swap = _best_swap(expert_to_rank[block], own[block], affinity[block], target)
        if swap is None:
            imbalance[block] = 0  # no swap improves this block, so it is ignored from now on
            continue
        expert_to_rank[block, swap] = expert_to_rank[block, swap[::-1]]
        work = np.bincount(expert_to_rank[block], own[block], placement.ranks) + shared[block]
        imbalance[block] = work.max() / work.mean()
    return expert_to_rank


def _affinity(routes: RoutingTable, placement: ExpertPlacement) -> np.ndarray:
    """Return (depth, M, P), the expected fraction of samples that use the expert and are assigned to rank p by path.

    It is 0 for replicated experts.
    """
    samples = -(-routes.tasks // placement.ranks) * placement.ranks
    tasks = routes.tasks_at(np.arange(samples) * routes.tasks / samples)
    assigned_rank = assign_samples(tasks, path_need(routes.experts, placement), samples // placement.ranks)
    affinity = np.zeros((routes.depth, routes.count, placement.ranks))
    for choice in range(routes.top_k):
        experts = routes.experts[:, tasks, choice]
        np.add.at(affinity, (np.arange(routes.depth)[:, None], experts, assigned_rank), 1 / samples)
    affinity[placement.replicated] = 0
    return affinity


def _best_swap(expert_to_rank: np.ndarray, loads: np.ndarray, affinity: np.ndarray, target: float) -> list[int] | None:
    """Return the two experts whose swap reduces the load of the block's most loaded rank at the smallest loss of affinity.

    Return None if no swap reduces it. A load below `target` is not rewarded.
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
    smallest = 1e-9  # of a load; a smaller difference is a rounding error, or is not worth a swap
    price = np.where(relief > smallest, (loss + smallest) / np.maximum(relief, smallest), np.inf)
    i, j = np.unravel_index(price.argmin(), price.shape)
    return None if np.isinf(price[i, j]) else [int(inside[i]), int(outside[j])]


def experts_moved(old: np.ndarray, new: np.ndarray) -> int:
    """Return the number of experts whose rank differs between two placements (depth, M)."""
    return int((old != new).sum())


def relabel(old: np.ndarray, new: np.ndarray, ranks: int) -> np.ndarray:
    """Return the placement `new` (depth, M) with renamed ranks, so that the fewest experts move from `old`.

    The renaming is the same in all blocks.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import: not for runs whose experts stay

    overlap = np.zeros((ranks, ranks), dtype=np.int64)
    np.add.at(overlap, (new, old), 1)
    return linear_sum_assignment(-overlap)[1][new]
