"""What is cheaper: samples that travel to an expert, or an expert's weights that come to the samples.

P ranks per group, n samples of a group and micro-step, M experts, k experts used per sample and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from sdit.model.moe.placement import (
    Layout,
    PlacementKind,
    expected_fullness,
    place_experts,
    relabel,
    replacement_moves,
)
from sdit.model.moe.routes import exact_loads, hottest
from sdit.model.moe.traffic import Costs, Practice

ExchangeKind = Literal["auto", "tokens", "weights"]
ROUNDS = 4  # of seating and choosing in turn; each round can only save bytes, most of it in the first two
STATE_COPIES = 4  # float32 tensors that move with an expert: weights, two Adam moments, EMA


@dataclass(frozen=True)
class Choice:
    """A layout and what is expected of it: `bytes` of a group per micro-step, and for comparison those if all samples,
    if all weights travelled, and if every (sample, expert) pair went to a random rank; `fullest` is the work of the
    fullest rank over the mean, averaged over the blocks."""

    layout: Layout
    bytes: float
    all_samples_bytes: float
    all_weights_bytes: float
    scattered_bytes: float
    fullest: float

    @property
    def burden(self) -> float:
        """Bytes plus the price of waiting for the fullest rank, in bytes.

        Waiting for another mean share of work is priced as the scattered exchange. By arithmetic the ratio of the two
        times is 0.4 D x bandwidth / FLOPS for linear experts, 8 x that for MLPs: 0.2 to 7 on common GPUs at D = 1152.
        """
        return self.bytes + (self.fullest - 1) * self.scattered_bytes

    @property
    def reason(self) -> str:
        """One line for the log."""
        at_hand = self.layout.at_hand.sum(axis=1)
        sizes = (self.bytes, self.all_samples_bytes, self.all_weights_bytes)
        chosen, samples, weights = (f"{size / 1e6:.1f} MB" for size in sizes)
        return (
            f"exchange: {at_hand.mean():.1f} of {self.layout.place.shape[1]} experts per block at hand "
            f"({at_hand.min()}..{at_hand.max()}), {chosen} per group and micro-step; all samples travelling {samples}, "
            f"all weights {weights}; fullest rank {self.fullest:.2f} x the mean"
        )


def choose_exchange(
    exchange: ExchangeKind, practice: Practice, place: np.ndarray, costs: Costs, at_least: np.ndarray | None = None
) -> Choice:
    """Which experts are at hand for a placement (depth, M): none (tokens), all (weights) or the cheapest set (auto).

    Under auto `at_least` (depth, M) bool are so in any case. Seats depend on what is at hand and the other way round:
    the two are solved in turn, each exactly, from three starting points.
    """
    none = Layout(place, np.zeros(place.shape, dtype=bool), practice.ranks)
    everything = Layout(place, np.ones(place.shape, dtype=bool), practice.ranks)
    samples_bytes, weights_bytes = practice.bytes(none, costs), practice.bytes(everything, costs)
    if exchange == "tokens":
        best, size = none, samples_bytes
    elif exchange == "weights":
        best, size = everything, weights_bytes
    else:
        start = none if at_least is None else Layout(place, at_least, practice.ranks)
        best, size = _cheapest(practice, start, costs)
    loads = exact_loads(practice.routes.experts, practice.routes.count)
    fullest = float(expected_fullness(loads, best).mean())
    return Choice(best, size, samples_bytes, weights_bytes, practice.scattered_bytes(costs), fullest)


def decide_layout(
    placement: PlacementKind,
    exchange: ExchangeKind,
    practice: Practice,
    costs: Costs,
    current: np.ndarray | None = None,
) -> Choice:
    """Where to place the experts and which to have at hand, for the least burden.

    A placement that counts on hot experts being at hand is uneven if they are not, so both ways are weighed.
    `current` is the placement (depth, M) in force: ranks are named so that the fewest experts move from it.
    """
    routes = practice.routes
    hot = hottest(exact_loads(routes.experts, routes.count), routes.top_k)
    found: list[Choice] = []
    for counted_on in (hot, np.zeros_like(hot)):
        place = place_experts(placement, routes, practice.ranks, counted_on)
        place = place if current is None else relabel(current, place, practice.ranks)
        found.append(choose_exchange(exchange, practice, place, costs))
        if exchange == "auto" and counted_on.any():
            found.append(choose_exchange(exchange, practice, place, costs, at_least=counted_on))
    return min(found, key=lambda choice: choice.burden)


def worth_moving(now: Choice, then: Choice, expert_parameters: int, micro_steps: int) -> bool:
    """Whether the layout `then` repays moving its experts, with their optimizer state, within `micro_steps`.

    `now` is the best choice for the placement in force.
    """
    moves = len(replacement_moves(now.layout.place, then.layout.place))
    moved_bytes = moves * expert_parameters * 4 * STATE_COPIES
    return moves > 0 and (now.burden - then.burden) * micro_steps > moved_bytes


def _cheapest(practice: Practice, start: Layout, costs: Costs) -> tuple[Layout, float]:
    """The cheapest layout found with at least `start.at_hand` at hand, and its bytes per micro-step."""
    hot = hottest(exact_loads(practice.routes.experts, practice.routes.count), practice.routes.top_k)
    with_hot = Layout(start.place, start.at_hand | hot, start.ranks)
    best, best_bytes = start, practice.bytes(start, costs)
    for seats in (practice.order_seats(), practice.seats(start), practice.seats(with_hot)):
        at_hand = start.at_hand
        for _ in range(ROUNDS):
            before, at_hand = at_hand, _worth_having(practice, start, seats, costs)
            if (before == at_hand).all():
                break
            layout = Layout(start.place, at_hand, start.ranks)
            seats = practice.seats(layout)
            size = practice.bytes(layout, costs, seats)
            if size < best_bytes:
                best, best_bytes = layout, size
    return best, best_bytes


def _worth_having(practice: Practice, start: Layout, seats: np.ndarray, costs: Costs) -> np.ndarray:
    """(depth, M) bool: the set of experts at hand of least bytes for given `seats` (batches, n).

    A hop is saved only if all experts that the sample uses on that rank are at hand: hops are projects, experts the
    tools they share, and the best set is a minimum cut (Picard 1976), over all blocks and ranks at once.
    """
    depth, count = start.place.shape
    bundles, hops = _bundles(practice, start, seats)
    size, units = len(bundles), depth * count
    member, tool = np.nonzero(bundles[:, 1:] >= 0)
    tools = bundles[member, 0] * count + bundles[member, 1 + tool]
    price = np.where(start.at_hand.ravel(), 0, costs.hand_bytes * practice.batches)
    profit = hops * costs.hop_bytes
    # The solver's capacities are int32. No bundle earns more than the sum, and dearer tools than that are never bought.
    total = max(int(profit.sum()), 1)
    amounts = np.concatenate([profit, np.minimum(price, total)]) * ((2**30) / total)
    tail = np.concatenate([np.zeros(size, dtype=np.int64), 2 + size + np.arange(units), 2 + member])
    head = np.concatenate([2 + np.arange(size), np.ones(units, dtype=np.int64), 2 + size + tools])
    capacity = np.concatenate([np.round(amounts), np.full(len(member), 2**30)]).astype(np.int32)
    graph = csr_array((capacity, (tail, head)), shape=(2 + size + units, 2 + size + units))
    residual = graph - maximum_flow(graph, 0, 1).flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    bought = np.zeros(2 + size + units, dtype=bool)
    bought[breadth_first_order(residual, 0, return_predecessors=False)] = True
    return bought[2 + size :].reshape(depth, count) | start.at_hand


def _bundles(practice: Practice, start: Layout, seats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (block, k expert ids or -1) of experts that samples need on one rank not their own, and the hops of each."""
    experts = practice.routes.experts[:, practice.tasks.ravel()]
    block = np.arange(len(experts))[:, None, None]
    rank = start.place[block, experts]
    away = rank != seats.ravel()[None, :, None]
    rows: list[np.ndarray] = []
    for choice in range(practice.routes.top_k):
        together = rank == rank[:, :, choice, None]
        first = away[:, :, choice] & ~together[:, :, :choice].any(axis=2)
        members = np.sort(np.where(together, experts, -1)[first], axis=1)
        rows.append(np.column_stack([np.nonzero(first)[0], members]))
    return np.unique(np.concatenate(rows), axis=0, return_counts=True)
