"""Which rank of an expert-parallel group holds which expert, and what it takes to change that.

M experts, P ranks per group with M / P experts of every block each, T tasks, N samples, k experts used per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from sdit.model.moe.routes import Routes, exact_loads, expert_counts, hottest
from sdit.model.moe.seating import seat

PlacementKind = Literal["index", "balanced", "path"]
# Aim of the path placement for expected loads; it leaves room for the scatter of real batches below 1.3.
FULLEST_RANK = 1.25


@dataclass(frozen=True)
class Layout:
    """Where the experts are: `place` (depth, M) owner's place in the group of `ranks` = P; `at_hand` (depth, M) bool
    for experts whose weights come to every rank, so that no sample travels to them."""

    place: np.ndarray
    at_hand: np.ndarray
    ranks: int

    @property
    def slots(self) -> np.ndarray:
        """(depth, P, M / P) ids of the experts each rank holds, rising."""
        return np.argsort(self.place, axis=1, kind="stable").reshape(len(self.place), self.ranks, -1)


def ranks_needed(experts: np.ndarray, layout: Layout, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth, N, P) bool: the sample uses an expert that only rank p can serve, for `experts` (depth, N, k)."""
    block = np.arange(len(experts))[:, None, None]
    wanted = ~layout.at_hand[block, experts]
    if kept is not None:
        wanted &= kept
    needed = np.zeros((*experts.shape[:2], layout.ranks), dtype=bool)
    depth, sample, choice = np.nonzero(wanted)
    needed[depth, sample, layout.place[depth, experts[depth, sample, choice]]] = True
    return needed


def path_need(experts: np.ndarray, layout: Layout) -> np.ndarray:
    """(T, P) int64: in how many blocks a task (depth, T, k) needs rank p; what `seat` decides by."""
    return ranks_needed(experts, layout).sum(axis=0)


def expected_fullness(loads: np.ndarray, layout: Layout) -> np.ndarray:
    """(depth,) expected work of the fullest rank over the mean; experts at hand are taken as spread evenly."""
    work = _rank_loads(np.where(layout.at_hand, 0, loads), layout.place, layout.ranks)
    work = work + np.where(layout.at_hand, loads, 0).sum(axis=1, keepdims=True) / layout.ranks
    return work.max(axis=1) / work.mean(axis=1)


def place_experts(
    kind: PlacementKind, routes: Routes, ranks: int, at_hand: np.ndarray | None = None, limit: float = FULLEST_RANK
) -> np.ndarray:
    """(depth, M) rank of each expert.

    index: in order of their ids. balanced: equal expected load. path: neighbours in time together, which keeps paths
    local, unless that fills a rank beyond `limit` x the mean (over the blocks). Load and traffic of experts `at_hand`
    (None: the k hottest of each block) do not depend on their place.
    """
    assert routes.count % ranks == 0, (routes.count, ranks)
    by_index = np.tile(np.arange(routes.count) // (routes.count // ranks), (routes.depth, 1))
    if kind == "index" or ranks == 1:
        return by_index
    loads = exact_loads(routes.experts, routes.count)
    at_hand = hottest(loads, routes.top_k) if at_hand is None else at_hand
    if kind == "balanced":
        return _largest_first(np.where(at_hand, 0, loads), ranks)
    place = np.empty_like(by_index)
    np.put_along_axis(place, np.argsort(_mean_task(routes), axis=1, kind="stable"), by_index, axis=1)
    return _level(routes, Layout(place, at_hand, ranks), limit)


def _rank_loads(loads: np.ndarray, place: np.ndarray, ranks: int) -> np.ndarray:
    """(depth, P) sum of the loads (depth, M) on each rank."""
    return np.stack([np.bincount(where, load, ranks) for where, load in zip(place, loads, strict=True)])


def _mean_task(routes: Routes) -> np.ndarray:
    """(depth, M) mean task of those that use the expert; infinite for unused experts, which so come last."""
    unit = routes.experts + np.arange(routes.depth)[:, None, None] * routes.count
    task = np.broadcast_to(np.arange(routes.tasks)[None, :, None], unit.shape)
    total = np.bincount(unit.ravel(), task.ravel(), minlength=routes.depth * routes.count).reshape(routes.depth, -1)
    users = expert_counts(routes.experts, routes.count)
    return np.where(users > 0, total / np.maximum(users, 1), np.inf)


def _largest_first(loads: np.ndarray, ranks: int) -> np.ndarray:
    """(depth, M) ranks: falling by load, each expert to the emptiest rank with a free slot (Graham 1969, LPT)."""
    depth, count = loads.shape
    blocks = np.arange(depth)
    place = np.empty((depth, count), dtype=np.int64)
    work, free = np.zeros((depth, ranks)), np.full((depth, ranks), count // ranks)
    for expert in np.argsort(-loads, axis=1, kind="stable").T:
        rank = np.where(free > 0, work, np.inf).argmin(axis=1)
        place[blocks, expert] = rank
        work[blocks, rank] += loads[blocks, expert]
        free[blocks, rank] -= 1
    return place


def _level(routes: Routes, layout: Layout, limit: float) -> np.ndarray:
    """(depth, M) ranks after swapping experts, worst block first, until the mean fullness is within `limit`."""
    loads = exact_loads(routes.experts, routes.count)
    place, fullness = layout.place.copy(), expected_fullness(loads, layout)
    if fullness.mean() <= limit:
        return place
    affinity = _affinity(routes, layout)
    own = np.where(layout.at_hand, 0, loads)
    shared = (loads - own).sum(axis=1) / layout.ranks
    while fullness.mean() > limit:
        block = int(fullness.argmax())
        swap = _best_swap(
            place[block], own[block], affinity[block], limit * loads[block].sum() / layout.ranks - shared[block]
        )
        if swap is None:
            fullness[block] = 0  # as level as it gets: leave it out
            continue
        place[block, swap] = place[block, swap[::-1]]
        work = np.bincount(place[block], own[block], layout.ranks) + shared[block]
        fullness[block] = work.max() / work.mean()
    return place


def _affinity(routes: Routes, layout: Layout) -> np.ndarray:
    """(depth, M, P) share of tasks that use the expert and sit on rank p when seated by path; 0 for experts at hand."""
    samples = -(-routes.tasks // layout.ranks) * layout.ranks
    tasks = np.arange(samples) * routes.tasks // samples
    seats = seat(tasks, path_need(routes.experts, layout), samples // layout.ranks)
    affinity = np.zeros((routes.depth, routes.count, layout.ranks))
    for choice in range(routes.top_k):
        np.add.at(affinity, (np.arange(routes.depth)[:, None], routes.experts[:, tasks, choice], seats), 1 / samples)
    affinity[layout.at_hand] = 0
    return affinity


def _best_swap(place: np.ndarray, loads: np.ndarray, affinity: np.ndarray, target: float) -> list[int] | None:
    """The two experts whose swap lightens the block's fullest rank at the least loss of affinity; None: no swap does.

    Relief counts down to `target`, the load that is light enough.
    """
    work = np.bincount(place, loads, affinity.shape[1])
    full = int(work.argmax())
    inside, outside = np.flatnonzero(place == full), np.flatnonzero(place != full)
    there = place[outside]
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
    """One expert of one block that changes its rank; ranks are places in the group."""

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
