"""Bytes on the wire: their unit costs, what a layout is expected to send, and what a plan does send.

P ranks per group, B samples per rank and micro-step, n = P * B, L tokens, D width, H hidden width, M experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.model.moe.placement import Layout, path_need, ranks_needed
from sdit.model.moe.routes import Routes
from sdit.model.moe.seating import seat

SeatingKind = Literal["order", "path"]
# Expected bytes then come within 5 % of those of other batches (EP 4 and 8); seating one batch takes about 1 ms.
PRACTICE_SAMPLES, PRACTICE_BATCHES = 1024, 32


def expert_parameters(kind: Literal["linear", "mlp"], width: int, hidden: int) -> int:
    """Parameters of one expert: D D + D, or D H + H + H D + D."""
    if kind == "linear":
        return width * width + width
    return 2 * width * hidden + hidden + width


@dataclass(frozen=True)
class Costs:
    """Bytes of a sample's tokens (`row_bytes` = L D x element size) and of one expert, for groups of `ranks` = P.

    A forward pass sends a row out and its result back, and brings the weights of an expert at hand to P - 1 ranks;
    the backward pass sends as many gradients the other way. `forwards` is 2 where activations are recomputed.
    """

    row_bytes: int
    expert_bytes: int
    ranks: int
    forwards: int = 1

    @property
    def hop_bytes(self) -> int:
        """Bytes per micro-step that one sample costs on one rank other than its own."""
        return 2 * (self.forwards + 1) * self.row_bytes

    @property
    def hand_bytes(self) -> int:
        """Bytes per micro-step that it costs the group to have one expert at hand everywhere."""
        return (self.forwards + 1) * (self.ranks - 1) * self.expert_bytes

    def sent_bytes(self, rows_sent: int, rows_received: int, hand_owned: int, hand_foreign: int) -> int:
        """Exact bytes one rank sends per micro-step, given the experts at hand that it owns, and those of others."""
        rows = (self.forwards + 1) * (rows_sent + rows_received) * self.row_bytes
        weights = self.forwards * (self.ranks - 1) * hand_owned + hand_foreign
        return rows + weights * self.expert_bytes


class Practice:
    """Uniformly drawn micro-steps of one group, always the same, on which layouts are weighed before they are used."""

    def __init__(self, routes: Routes, ranks: int, per_rank: int, seating: SeatingKind = "path") -> None:
        self.routes, self.ranks, self.per_rank, self.seating = routes, ranks, per_rank, seating
        samples = ranks * per_rank
        batches = min(max(1, PRACTICE_SAMPLES // samples), PRACTICE_BATCHES)
        self.tasks = np.random.default_rng(0).integers(0, routes.tasks, (batches, samples))

    @property
    def batches(self) -> int:
        return len(self.tasks)

    def order_seats(self) -> np.ndarray:
        """(batches, n) ranks of samples that stay where they were loaded."""
        return np.broadcast_to(np.arange(self.tasks.shape[1]) % self.ranks, self.tasks.shape)

    def seats(self, layout: Layout) -> np.ndarray:
        """(batches, n) ranks of the samples under the layout."""
        if self.seating == "order":
            return self.order_seats()
        need = path_need(self.routes.experts, layout)
        return np.stack([seat(tasks, need, self.per_rank) for tasks in self.tasks])

    def hops(self, layout: Layout, seats: np.ndarray | None = None) -> float:
        """Samples that travel, counted once per block and rank they visit, per micro-step of the group."""
        seats = self.seats(layout) if seats is None else seats
        need = path_need(self.routes.experts, layout)[self.tasks]
        at_home = np.take_along_axis(need, seats[..., None], axis=2)
        return float(need.sum() - at_home.sum()) / self.batches

    def scattered_bytes(self, costs: Costs) -> float:
        """Expected bytes of the group if every (sample, expert) pair travelled by itself to a random rank."""
        pairs = self.tasks.shape[1] * self.routes.depth * self.routes.top_k
        return pairs * (self.ranks - 1) / self.ranks * costs.hop_bytes

    def bytes(self, layout: Layout, costs: Costs, seats: np.ndarray | None = None) -> float:
        """Expected bytes of the group in one micro-step's forward and backward pass."""
        return self.hops(layout, seats) * costs.hop_bytes + float(layout.at_hand.sum()) * costs.hand_bytes


def rank_work(experts: np.ndarray, layout: Layout, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth, P) number of (sample, expert) pairs each rank computes for the group's samples in seated order.

    `experts`, `kept` are (depth, n, k), the B samples of rank 0 first.
    """
    depth, samples, _ = experts.shape
    block = np.arange(depth)[:, None, None]
    seated = (np.arange(samples) // (samples // layout.ranks))[None, :, None]
    rank = np.where(layout.at_hand[block, experts], seated, layout.place[block, experts])
    flat = rank + block * layout.ranks
    flat = flat.ravel() if kept is None else flat[kept]
    return np.bincount(flat, minlength=depth * layout.ranks).reshape(depth, layout.ranks)


def group_hops(experts: np.ndarray, layout: Layout, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth,) samples that travel in each block, once per rank visited, for the group's samples in seated order."""
    needed = ranks_needed(experts, layout, kept)
    depth, samples, ranks = needed.shape
    at_home = needed.reshape(depth, ranks, samples // ranks, ranks)[:, np.arange(ranks), :, np.arange(ranks)]
    return needed.sum(axis=(1, 2)) - at_home.sum(axis=(0, 2))
