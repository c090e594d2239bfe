"""When the placement of experts is reconsidered during a run, and which one replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdit.config import ModelConfig, ParallelConfig
from sdit.distributed.comm import Comm
from sdit.expert_parallel.exchange_costs import ExchangeCosts
from sdit.expert_parallel.migration import MigratableState
from sdit.expert_parallel.placed_experts import PlacedExperts
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.strategy import choose_exchange, decide_placement, worth_moving
from sdit.expert_parallel.traffic_model import TrafficModel, expert_parameters
from sdit.topology import BatchPlan


@dataclass(frozen=True)
class Rebalanced:
    """A change of placement: why, and how many experts moved to another rank. Replicas may change without a move."""

    reason: str
    experts_moved: int


class Rebalancer:
    """Reconsiders owners and replicas at the start of a run and at the configured intervals."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, batch: BatchPlan, comm: Comm, placed: PlacedExperts,
        costs: ExchangeCosts,
    ) -> None:  # fmt: skip
        self._config, self._parallel, self._batch, self._comm, self._placed = model, parallel, batch, comm, placed
        self._expert_parameters = expert_parameters(
            model.experts.kind, model.width, int(model.width * model.experts.mlp_ratio)
        )
        self._costs = costs
        self._is_started = False

    def rebalance_if_due(
        self, images_seen: int, table: Callable[[], RoutingTable], state: MigratableState
    ) -> Rebalanced | None:
        """Move experts, or change which are replicated, if it is due and pays. `table` returns the present gates."""
        is_first, self._is_started = not self._is_started and not self._placed.is_restored, True
        placement_due = is_first or self._is_due(images_seen, self._parallel.placement_refresh_images)
        if not placement_due and not self._is_due(images_seen, self._parallel.exchange_refresh_images):
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
        placement = self._agree(best.placement)
        same = (placement.expert_to_rank == present.expert_to_rank).all()
        same = same and (placement.replicated == present.replicated).all()
        return None if same else (placement, best.reason)

    def _is_due(self, images_seen: int, every_images: int) -> bool:
        return images_seen // every_images > (images_seen - self._batch.global_batch) // every_images

    def _agree(self, placement: ExpertPlacement) -> ExpertPlacement:
        """Return rank 0's placement on all ranks. A tie that ranks break differently would hang the exchange."""
        owners, replicated = self._comm.from_first([placement.expert_to_rank.tolist(), placement.replicated.tolist()])
        return ExpertPlacement(np.array(owners), np.array(replicated, dtype=bool), placement.ranks)
