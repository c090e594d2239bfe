"""Assigns the samples of an expert-parallel group to ranks: each to the rank that owns most experts of its path.

n = P * B samples of one group and micro-step, P ranks with B samples each, T tasks. A path is the sequence of experts
that a task uses, over all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FAR = 1 << 40  # more than any path cost; the sum of two is far below 2^63


def assign_samples(
    tasks: np.ndarray, need: np.ndarray, per_rank: int, source_rank: np.ndarray | None = None
) -> np.ndarray:
    """Return the rank (n,) int64 of each sample that minimises the number of path blocks on other ranks.

    Each rank gets B = `per_rank` samples. The result is optimal: samples of equal need are one supply of a transportation
    problem, which successive shortest paths over the P ranks solve.

    Args:
        tasks: (n,) tasks of the samples.
        need: (T, P) number of blocks in which a task uses rank p.
        source_rank: (n,) rank that loaded each sample. Among samples of equal need, those that stay there are preferred.
    """
    ranks = need.shape[1]
    assert len(tasks) == per_rank * ranks, (len(tasks), per_rank, ranks)
    present, task_of_sample = np.unique(tasks, return_inverse=True)
    rows, kind_of_task = np.unique(need[present], axis=0, return_inverse=True)
    kind = kind_of_task.ravel()[task_of_sample]
    flow = _transport(rows.max(axis=1, keepdims=True) - rows, np.bincount(kind, minlength=len(rows)), per_rank)
    return _deal(kind, flow, source_rank if source_rank is not None else np.zeros_like(tasks))


def _transport(cost: np.ndarray, supply: np.ndarray, per_rank: int) -> np.ndarray:
    """Return (K, P) int64, the samples of each kind on each rank with minimal total `cost` (K, P).

    `supply` (K,) are the samples of each kind. Each rank gets B samples. First, each kind is put on its best rank. Then
    the cheapest chains of moves lead from overfull ranks to free ranks, which keeps the assignment optimal for its fill
    (Ahuja, Magnanti, Orlin, "Network Flows", 9.7).
    """
    kinds, ranks = cost.shape
    flow = np.zeros((kinds, ranks), dtype=np.int64)
    flow[np.arange(kinds), cost.argmin(axis=1)] = supply
    fill = flow.sum(axis=0)
    moves = _Moves(cost.astype(np.int64), flow)
    while (fill > per_rank).any():
        chain = moves.cheapest_chain(fill > per_rank, fill < per_rank)
        first, last = chain[0][0], chain[-1][1]
        limit = int(min(fill[first] - per_rank, per_rank - fill[last]))
        moved = moves.apply(chain, limit)
        fill[first] -= moved
        fill[last] += moved
    return flow


class _Moves:
    """The cheapest single move between any two ranks. `flow` is changed in place."""

    def __init__(self, cost: np.ndarray, flow: np.ndarray) -> None:
        ranks = cost.shape[1]
        self.cost, self.flow = cost, flow
        self.price = np.empty((ranks, ranks), dtype=np.int64)  # of moving one sample from row to column
        self.kind = np.empty((ranks, ranks), dtype=np.int64)  # the kind with this price
        for rank in range(ranks):
            self._refresh(rank)

    def _refresh(self, rank: int) -> None:
        present = np.flatnonzero(self.flow[:, rank])
        if not len(present):
            self.price[rank] = _FAR
            return
        price = self.cost[present] - self.cost[present, rank, None]
        best = price.argmin(axis=0)
        self.kind[rank] = present[best]
        self.price[rank] = np.take_along_axis(price, best[None], axis=0)[0]

    def cheapest_chain(self, full: np.ndarray, free: np.ndarray) -> list[tuple[int, int]]:
        """Return the (from, to) moves of the cheapest chain from a full rank to a free rank.

        The search is Bellman-Ford on P ranks.
        """
        distance = np.where(full, 0, _FAR)
        before = np.full(len(full), -1)
        while True:
            through = distance[:, None] + self.price
            shorter = through.min(axis=0) < distance
            if not shorter.any():
                break
            before = np.where(shorter, through.argmin(axis=0), before)
            distance = np.where(shorter, through.min(axis=0), distance)
        rank = int(np.where(free, distance, 2 * _FAR).argmin())
        chain: list[tuple[int, int]] = []
        while before[rank] >= 0:
            chain.append((int(before[rank]), rank))
            rank = int(before[rank])
        return chain[::-1]

    def apply(self, chain: list[tuple[int, int]], limit: int) -> int:
        """Move up to `limit` samples along the chain, limited by its scarcest kind. Return how many were moved."""
        kinds = [self.kind[move] for move in chain]
        moved = min([limit, *(int(self.flow[kind, source]) for kind, (source, _) in zip(kinds, chain, strict=True))])
        for kind, (source, target) in zip(kinds, chain, strict=True):
            self.flow[kind, source] -= moved
            self.flow[kind, target] += moved
        for rank in {rank for move in chain for rank in move}:
            self._refresh(rank)
        return moved


def _deal(kind: np.ndarray, flow: np.ndarray, source_rank: np.ndarray) -> np.ndarray:
    """Return the rank (n,) of each sample of `kind` (n,) for `flow` (K, P).

    Samples first fill the flow of their source rank. The others follow in order.
    """
    kinds, ranks = flow.shape
    assigned_rank = np.empty(len(kind), dtype=np.int64)
    group = kind * ranks + source_rank
    order = np.argsort(group, kind="stable")
    turn = np.arange(len(kind)) - np.searchsorted(group[order], group[order])
    stays = np.zeros(len(kind), dtype=bool)
    stays[order] = turn < flow.ravel()[group[order]]
    assigned_rank[stays] = source_rank[stays]
    left = flow.ravel() - np.bincount(group[stays], minlength=kinds * ranks)
    movers = np.flatnonzero(~stays)
    movers = movers[np.argsort(kind[movers], kind="stable")]
    assigned_rank[movers] = np.repeat(np.tile(np.arange(ranks), kinds), left)
    return assigned_rank


@dataclass(frozen=True)
class SampleExchange:
    """The all-to-all in which one rank sends the samples that it loaded to the ranks that compute them.

    `send_rows` (B,) are the loaded samples by destination. `send_splits` and `receive_splits` (P,) count samples per rank. A
    rank may send samples to itself. The received samples, indexed by `order` (B,), have ascending sample indices.
    """

    send_rows: np.ndarray
    send_splits: np.ndarray
    receive_splits: np.ndarray
    order: np.ndarray


def plan_sample_exchange(
    source_rank: np.ndarray, assigned_rank: np.ndarray, ranks: int, ep_rank: int
) -> SampleExchange:
    """Return the exchange of one rank.

    `source_rank` and `assigned_rank` (n,) are the ranks that load and compute each sample.
    """
    targets, sources = assigned_rank[source_rank == ep_rank], source_rank[assigned_rank == ep_rank]
    return SampleExchange(
        send_rows=np.argsort(targets, kind="stable"),
        send_splits=np.bincount(targets, minlength=ranks),
        receive_splits=np.bincount(sources, minlength=ranks),
        order=np.argsort(np.argsort(sources, kind="stable"), kind="stable"),
    )
