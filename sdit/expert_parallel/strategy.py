"""Chooses the cheaper exchange for each expert: samples are sent to the expert, or its weights are sent to all ranks.

The cost is counted in bytes, or in seconds if the speeds of the group are known.

P ranks per group, n samples of a group and micro-step, M experts of a block, k experts used per sample and block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from sdit.expert_parallel.placement import (
    ExpertPlacement,
    PlacementKind,
    expected_load_imbalance,
    experts_moved,
    place_experts,
    relabel,
)
from sdit.expert_parallel.routing_table import hottest
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts

ExchangeKind = Literal["auto", "tokens", "weights"]
ROUNDS = 4  # of assigning samples and choosing replicas alternately. No round adds bytes, and the first two save most
STATE_COPIES = 4  # float32 tensors that move with an expert: weights, two Adam moments, EMA


class Seconds(NamedTuple):
    """Expected seconds per micro-step: of the exchange, if all samples or all weights are sent, and of a rank's mean work."""

    exchange: float
    all_samples: float
    all_weights: float
    mean_work: float


@dataclass(frozen=True)
class Choice:
    """A placement and its expected cost.

    `bytes` of a group per micro-step. For comparison: the bytes if all samples are sent, if all weights are sent, and of
    the random-placement baseline. `load_imbalance` is max / mean of the ranks' work, averaged over the blocks. `seconds` is
    None if the speeds of the group are not known.
    """

    placement: ExpertPlacement
    bytes: float
    all_samples_bytes: float
    all_weights_bytes: float
    random_placement_bytes: float
    load_imbalance: float
    seconds: Seconds | None = None

    @property
    def cost(self) -> float:
        """The cost of the exchange and of waiting for the most loaded rank: seconds, or bytes if the speeds are not known.

        In bytes, waiting for one more mean share of work costs as much as the random-placement baseline. By calculation the
        ratio of the two times is 0.4 D x bandwidth / FLOPS for linear experts and 8 x that for MLPs: 0.2 to 7 on common GPUs at
        D = 1152.
        """
        if self.seconds is None:
            return self.bytes + (self.load_imbalance - 1) * self.random_placement_bytes
        return self.seconds.exchange + (self.load_imbalance - 1) * self.seconds.mean_work

    @property
    def reason(self) -> str:
        """The choice in one line, for the log."""
        replicated = self.placement.replicated.sum(axis=1)
        sizes = (self.bytes, self.all_samples_bytes, self.all_weights_bytes)
        chosen, samples, weights = (f"{size / 1e6:.1f} MB" for size in sizes)
        if self.seconds is not None:
            each = (self.seconds.exchange, self.seconds.all_samples, self.seconds.all_weights)
            chosen, samples, weights = (
                f"{size} and {1000 * seconds:.2f} ms"
                for size, seconds in zip((chosen, samples, weights), each, strict=True)
            )
        return (
            f"exchange: {replicated.mean():.1f} of {self.placement.expert_to_rank.shape[1]} experts per block replicated "
            f"({replicated.min()}..{replicated.max()}), {chosen} per group and micro-step; all samples travelling {samples}, "
            f"all weights {weights}; most loaded rank {self.load_imbalance:.2f} x the mean"
        )


def choose_exchange(
    exchange: ExchangeKind,
    traffic: TrafficModel,
    expert_to_rank: np.ndarray,
    costs: UnitCosts,
    at_least: np.ndarray | None = None,
) -> Choice:
    """Return the replicated experts for owners (depth, M): none (tokens), all (weights) or the cheapest set (auto).

    Under auto, the experts `at_least` (depth, M) bool are always replicated. The assignment of samples depends on the
    replicas, and the best replicas depend on the assignment. The two are solved alternately, each exactly, from three
    starting points. The cheapest set has the fewest bytes, or the fewest seconds if the costs have speeds.
    """
    none = ExpertPlacement(expert_to_rank, np.zeros(expert_to_rank.shape, dtype=bool), traffic.ranks)
    everything = ExpertPlacement(expert_to_rank, np.ones(expert_to_rank.shape, dtype=bool), traffic.ranks)
    if exchange == "tokens":
        best = none
    elif exchange == "weights":
        best = everything
    else:
        start = none if at_least is None else ExpertPlacement(expert_to_rank, at_least, traffic.ranks)
        best = _cheapest(traffic, start, costs)
    size, samples, weights = (traffic.bytes(placement, costs) for placement in (best, none, everything))
    load_imbalance = float(expected_load_imbalance(traffic.routes.loads, best).mean())
    choice = Choice(best, size, samples, weights, traffic.random_placement_bytes(costs), load_imbalance)
    if costs.speeds is None:
        return choice
    size, samples, weights = (traffic.cost(placement, costs) for placement in (best, none, everything))
    work = costs.work_seconds(expert_to_rank.shape[0] * traffic.tasks.shape[1])
    return replace(choice, seconds=Seconds(size, samples, weights, work))


def decide_placement(
    kind: PlacementKind,
    exchange: ExchangeKind,
    traffic: TrafficModel,
    costs: UnitCosts,
    current: np.ndarray | None = None,
) -> Choice:
    """Return the owners and the replicated experts with the lowest cost.

    A placement made for replicated hot experts is unbalanced if they are not replicated, so both cases are compared.
    `current` is the current placement (depth, M). Ranks are renamed so that the fewest experts move from it.
    """
    routes = traffic.routes
    hot = hottest(routes.loads, routes.top_k)
    found: list[Choice] = []
    for counted_on in (hot, np.zeros_like(hot)):
        expert_to_rank = place_experts(kind, routes, traffic.ranks, counted_on)
        expert_to_rank = expert_to_rank if current is None else relabel(current, expert_to_rank, traffic.ranks)
        found.append(choose_exchange(exchange, traffic, expert_to_rank, costs))
        if exchange == "auto" and counted_on.any():
            found.append(choose_exchange(exchange, traffic, expert_to_rank, costs, at_least=counted_on))
    return min(found, key=lambda choice: choice.cost)


def worth_moving(now: Choice, then: Choice, costs: UnitCosts, expert_parameters: int, micro_steps: int) -> bool:
    """Return True if the placement `then` saves more in `micro_steps` than its moves cost.

    A move includes the optimizer state. `now` is the best choice for the current placement.
    """
    moves = experts_moved(now.placement.expert_to_rank, then.placement.expert_to_rank)
    moving = costs.moving_cost(moves * expert_parameters * 4 * STATE_COPIES)
    return moves > 0 and (now.cost - then.cost) * micro_steps > moving


def _cheapest(traffic: TrafficModel, start: ExpertPlacement, costs: UnitCosts) -> ExpertPlacement:
    """Return the cheapest placement found with at least `start.replicated`."""
    hot = hottest(traffic.routes.loads, traffic.routes.top_k)
    with_hot = ExpertPlacement(start.expert_to_rank, start.replicated | hot, start.ranks)
    best, best_cost = start, traffic.cost(start, costs)
    for assigned_rank in (traffic.ranks_in_order(), traffic.assigned_ranks(start), traffic.assigned_ranks(with_hot)):
        replicated = start.replicated
        for _ in range(ROUNDS):
            before, replicated = replicated, _cheapest_replicas(traffic, start, assigned_rank, costs)
            if (before == replicated).all():
                break
            placement = ExpertPlacement(start.expert_to_rank, replicated, start.ranks)
            assigned_rank = traffic.assigned_ranks(placement)
            cost = traffic.cost(placement, costs, assigned_rank)
            if cost < best_cost:
                best, best_cost = placement, cost
    return best if costs.speeds is None else _with_fixed_costs(traffic, start, best, costs)


def _with_fixed_costs(
    traffic: TrafficModel, start: ExpertPlacement, best: ExpertPlacement, costs: UnitCosts
) -> ExpertPlacement:
    """Return the cheapest of `best`, all replicas, and the best of both and `start` in each block.

    The minimum cut does not count the fixed costs of a block. For an assignment of samples the blocks are independent.
    """
    everything = ExpertPlacement(start.expert_to_rank, np.ones_like(start.replicated), start.ranks)
    choices, found = (start, best, everything), [best, everything]
    for assigned_rank in (traffic.assigned_ranks(choice) for choice in choices):
        seconds = [traffic.block_seconds(choice, costs, assigned_rank) for choice in choices]
        replicated = np.stack([choice.replicated for choice in choices])
        by_block = replicated[np.argmin(seconds, axis=0), np.arange(len(start.replicated))]
        found.append(ExpertPlacement(start.expert_to_rank, by_block, start.ranks))
    return min(found, key=lambda placement: traffic.cost(placement, costs))


def _cheapest_replicas(
    traffic: TrafficModel, start: ExpertPlacement, assigned_rank: np.ndarray, costs: UnitCosts
) -> np.ndarray:
    """Return (depth, M) bool, the cheapest set of replicated experts for samples on `assigned_rank` (batches, n).

    A transfer is saved only if all experts that the sample uses on that rank are replicated. This is the project selection
    problem: transfers are projects, and experts are the tools that they share. The best set is a minimum cut (Picard 1976),
    over all blocks and ranks at once.
    """
    from scipy.sparse import csr_array  # slow to import: not for EP = 1
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    depth, count = start.expert_to_rank.shape
    bundles, transfers = _bundles(traffic, start, assigned_rank)
    size, units = len(bundles), depth * count
    member, tool = np.nonzero(bundles[:, 1:] >= 0)
    tools = bundles[member, 0] * count + bundles[member, 1 + tool]
    price = np.where(start.replicated.ravel(), 0, costs.replica_cost * traffic.batches)
    profit = transfers * costs.transfer_cost
    # The solver's capacities are int32. A tool that costs more than the total profit is never bought, so prices are limited.
    total = float(profit.sum()) or 1.0
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
    return bought[2 + size :].reshape(depth, count) | start.replicated


def _bundles(traffic: TrafficModel, start: ExpertPlacement, assigned_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (block, k expert ids or -1) of the experts that samples need on one other rank, and the transfers of each."""
    experts = traffic.routes.experts[:, traffic.tasks.ravel()]
    block = np.arange(len(experts))[:, None, None]
    rank = start.expert_to_rank[block, experts]
    away = rank != assigned_rank.ravel()[None, :, None]
    rows: list[np.ndarray] = []
    for choice in range(traffic.routes.top_k):
        together = rank == rank[:, :, choice, None]
        first = away[:, :, choice] & ~together[:, :, :choice].any(axis=2)
        members = np.sort(np.where(together, experts, -1)[first], axis=1)
        rows.append(np.column_stack([np.nonzero(first)[0], members]))
    return np.unique(np.concatenate(rows), axis=0, return_counts=True)
