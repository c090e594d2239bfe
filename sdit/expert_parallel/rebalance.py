"""When the placement of experts is reconsidered during a run, and which one replaces it.

M experts of a block, k experts of a token, P ranks of a group, B samples of a rank, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdit.config import ModelConfig, ParallelConfig
from sdit.expert_parallel.exchange_costs import ExchangeCosts
from sdit.expert_parallel.migration import MigratableState
from sdit.expert_parallel.placed_experts import PlacedExperts
from sdit.expert_parallel.placement import ExpertPlacement, expected_load_imbalance, largest_first, relabel
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.strategy import STATE_COPIES, choose_exchange, decide_placement, worth_moving
from sdit.expert_parallel.traffic_model import ExpertFlops, TrafficModel, UnitCosts, expert_parameters
from sdit.topology import BatchPlan


@dataclass(frozen=True)
class Rebalanced:
    """A change of placement: why, and how many experts moved to another rank. Replicas may change without a move."""

    reason: str
    experts_moved: int


class Rebalancer:
    """Reconsiders owners and replicas at the start of a run and at the configured intervals."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, batch: BatchPlan, placed: PlacedExperts, costs: ExchangeCosts
    ) -> None:  # fmt: skip
        self._config, self._parallel, self._batch, self._placed = model, parallel, batch, placed
        self._expert_parameters = expert_parameters(model.experts, model.width)
        self._costs = costs
        self._is_started = False

    def rebalance_if_due(
        self, images_seen: int, table: Callable[[], RoutingTable], state: MigratableState
    ) -> Rebalanced | None:
        """Move experts, or change which are replicated, if it is due and pays. `table` returns the present gates."""
        is_first, self._is_started = not self._is_started and not self._placed.is_restored, True
        parallel, step = self._parallel, self._batch.global_batch
        placement_due = is_first or _is_due(images_seen, parallel.placement_refresh_images, step)
        if not placement_due and not _is_due(images_seen, parallel.exchange_refresh_images, step):
            return None
        better = self.better_placement(table(), placement_due, is_first)
        if better is None:
            return None
        placement, reason = better
        are_zero = images_seen == 0 and self._config.experts.kind == "linear" and self._placed.starts_random
        return Rebalanced(reason, self._placed.adopt(placement, None if are_zero else state))

    def better_placement(
        self, table: RoutingTable, placement_due: bool, is_first: bool
    ) -> tuple[ExpertPlacement, str] | None:
        """Return a better placement for the gates and the reason, or None.

        If `is_first`, the run starts or has changed its layout, and the cost of moving experts does not count.
        """
        parallel, present, costs = self._parallel, self._placed.placement, self._costs.unit_costs()
        traffic = TrafficModel(table, present.ranks, self._batch.micro_batch, parallel.seating)
        best = now = choose_exchange(parallel.exchange, traffic, present.expert_to_rank, costs)
        if placement_due and parallel.placement != "index":
            owners = present.expert_to_rank
            then = decide_placement(parallel.placement, parallel.exchange, traffic, costs, owners)
            micro_steps = parallel.placement_refresh_images // self._batch.chunk
            if is_first or worth_moving(now, then, costs, self._expert_parameters, micro_steps):
                best = then
        placement = self._placed.agree(best.placement)
        same = (placement.expert_to_rank == present.expert_to_rank).all()
        same = same and (placement.replicated == present.replicated).all()
        return None if same else (placement, best.reason)


class TokenRebalancer:
    """Counts the choices of token-routed experts, and moves experts where even loads of the ranks repay it.

    The choices are those of the whole run, by block and global expert id. They are counted from one check to the next, and
    checkpoints store them.
    """

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, batch: BatchPlan, placed: PlacedExperts, costs: ExchangeCosts
    ) -> None:  # fmt: skip
        self._config, self._parallel, self._batch, self._placed, self._costs = model, parallel, batch, placed, costs
        self._counts = np.zeros(placed.placement.expert_to_rank.shape, dtype=np.int64)
        self._is_started = False

    def count(self, choices: np.ndarray) -> None:
        """Count the choices (blocks, M) of each expert in a step of all ranks, before drops."""
        self._counts += choices.astype(np.int64)

    def stored(self) -> dict[str, Any]:
        """Return the choices since the last check as a checkpoint carries them."""
        return {"token_counts": self._counts.tolist()}

    def restore(self, stored: dict[str, Any] | None) -> None:
        """Continue with the choices that a checkpoint has counted. Without them, the count begins at zero."""
        counts = np.array((stored or {}).get("token_counts", []), dtype=np.int64)
        self._counts = counts if counts.shape == self._counts.shape else np.zeros_like(self._counts)

    def rebalance_if_due(self, images_seen: int, state: MigratableState) -> Rebalanced | None:
        """Move experts if it is due and pays. All ranks call this together, and have counted the same."""
        is_first, self._is_started = not self._is_started and not self._placed.is_restored, True
        every, step = self._parallel.placement_refresh_images, self._batch.global_batch
        if not self._counts.any() or not (is_first or _is_due(images_seen, every, step)):
            return None
        counts, self._counts = self._counts, np.zeros_like(self._counts)
        present = self._placed.placement
        if present.ranks == 1 or self._parallel.placement == "index":
            return None
        loads = self._served(counts)
        better = even_placement(loads, present, 0 if is_first else self._imbalance_of_a_move())
        placement = self._placed.agree(better)
        if (placement.expert_to_rank == present.expert_to_rank).all():
            return None
        before, after = (expected_load_imbalance(loads, each).mean() for each in (present, placement))
        reason = f"token-routed experts: most loaded rank {before:.2f} -> {after:.2f} x the mean"
        return Rebalanced(reason, self._placed.adopt(placement, state))

    def _served(self, counts: np.ndarray) -> np.ndarray:
        """Return the loads (blocks, M) of the experts: their choices, limited by the capacity."""
        moe = self._config.moe
        assert moe is not None
        if moe.router == "expert_choice" or moe.capacity_factor is None:
            return counts
        return np.minimum(counts, moe.capacity_factor * counts.mean(axis=1, keepdims=True))

    def _imbalance_of_a_move(self) -> float:
        """Return the decrease of max / mean of a block's ranks that repays the move of one expert until the next check.

        As for sample-routed experts (`Choice.cost`, `worth_moving`), waiting for one more mean share of work is counted in
        seconds if the speeds of the group are known. Otherwise it is counted as the bytes of the tokens if each (token, expert)
        pair is sent to a random rank. A move includes the optimizer state.
        """
        model, ranks, costs = self._config, self._placed.placement.ranks, self._pair_costs()
        assert model.moe is not None
        pairs = ranks * self._batch.micro_batch * model.tokens * model.moe.experts_per_token(model.tokens)
        random_bytes = pairs * (ranks - 1) / ranks * costs.transfer_bytes
        work = random_bytes if costs.speeds is None else costs.work_seconds(pairs)
        micro_steps = self._parallel.placement_refresh_images / self._batch.chunk
        parameters = sum(parameter[0].numel() for parameter in self._placed.layers[0].parameters())
        return costs.moving_cost(parameters * 4 * STATE_COPIES) / (work * micro_steps)

    def _pair_costs(self) -> UnitCosts:
        """Return the unit costs of the run, with a (token, expert) pair instead of a sample."""
        model, costs = self._config, self._costs.unit_costs()
        assert model.moe is not None
        products = (3 if model.moe.kind == "swiglu" else 2) * model.width * model.moe.hidden(model.width)
        return replace(costs, row_bytes=costs.row_bytes // model.tokens, flops=ExpertFlops(sample=2.0 * products))


def even_placement(loads: np.ndarray, present: ExpertPlacement, imbalance_of_a_move: float) -> ExpertPlacement:
    """Return the placement with even loads (blocks, M) in each block in which it pays, and the present one in the others.

    It pays if it decreases max / mean of the ranks' loads by more than `imbalance_of_a_move` for each expert that moves.
    """
    owners, ranks = present.expert_to_rank, present.ranks
    even = largest_first(loads, ranks)
    even = np.concatenate([relabel(old[None], new[None], ranks) for old, new in zip(owners, even, strict=True)])
    then = ExpertPlacement(even, present.replicated, ranks)
    gain = expected_load_imbalance(loads, present) - expected_load_imbalance(loads, then)
    pays = gain > imbalance_of_a_move * (even != owners).sum(axis=1)
    return ExpertPlacement(np.where(pays[:, None], even, owners), present.replicated, ranks)


def _is_due(images_seen: int, every_images: int, global_batch: int) -> bool:
    return images_seen // every_images > (images_seen - global_batch) // every_images
