"""The experts of a model on the ranks of their group: which rank owns which, the local weights, and moves between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdit.config import ModelConfig
from sdit.distributed.comm import Comm
from sdit.expert_parallel.migration import MigratableState, migrate
from sdit.expert_parallel.placement import ExpertPlacement, replacement_moves
from sdit.expert_parallel.sharded_experts import ShardedExperts, TrainedShardedExperts
from sdit.model import DiffusionTransformer
from sdit.model.dit import Router
from sdit.model.moe.experts import build_experts


class PlacedExperts:
    """The `placement` of a run, and the `layers` of local experts, one per block (none if a rank owns all experts).

    `is_restored`: the placement is a checkpoint's. `starts_random`: the run begins with random weights, not with given ones.
    """

    def __init__(self, model: ModelConfig, comm: Comm, ranks: int, ep_rank: int) -> None:
        self._config, self._comm, self._ranks, self._ep_rank = model, comm, ranks, ep_rank
        count = model.experts.count
        in_order = np.tile(np.arange(count) // (count // ranks), (model.depth, 1))
        self.placement = ExpertPlacement(in_order, np.zeros(in_order.shape, dtype=bool), ranks)
        self.layers: tuple[ShardedExperts, ...] = ()
        self.is_restored = False
        self.starts_random = True

    def shard(
        self, model: DiffusionTransformer, init_weights: Callable[[DiffusionTransformer], None], is_random: bool
    ) -> None:
        """Leave each router of a model on the meta device the experts of this rank, and initialise the weights."""
        self.starts_random = is_random
        experts = self._config.experts
        if self._ranks > 1:
            for router, ids_of_rank in zip(model.routers, self.placement.experts_of_rank, strict=True):
                router.experts = build_experts(experts, self._config.width, ids_of_rank[self._ep_rank])
        model.to_empty(device=self._comm.device)
        init_weights(model)
        if self._ranks > 1:
            routers = [router for router in model.routers if isinstance(router, Router)]
            is_trained = any(parameter.requires_grad for router in routers for parameter in router.experts.parameters())
            layer = TrainedShardedExperts if is_trained else ShardedExperts
            self.layers = tuple(layer(router.experts, experts.count, self._ranks) for router in routers)
            for router, sharded in zip(routers, self.layers, strict=True):
                router.experts = sharded  # type: ignore[assignment]

    def stored(self) -> dict[str, Any]:
        """Return the placement as a checkpoint carries it."""
        owners, replicated = self.placement.expert_to_rank.tolist(), self.placement.replicated.tolist()
        return {"ranks": self._ranks, "place": owners, "at_hand": replicated}  # keys of checkpoint format 1

    def restore(self, stored: dict[str, Any]) -> None:
        """Use a checkpoint's placement if it was made for as many ranks, blocks and experts. Called before `shard`."""
        if stored["ranks"] != self._ranks:
            return
        owners, replicated = np.array(stored["place"]), np.array(stored["at_hand"], dtype=bool)
        present = self.placement.expert_to_rank
        if owners.shape != present.shape or replicated.shape != present.shape:
            return
        if (np.sort(owners) != np.sort(present)).any():
            return
        self.placement, self.is_restored = ExpertPlacement(owners, replicated, self._ranks), True

    def adopt(self, placement: ExpertPlacement, state: MigratableState | None) -> int:
        """Change the placement on all ranks, and return how many experts moved. The numbers of the run do not change.

        `state` None: all experts, their moments and averages are still zero, so that only their ids move.
        """
        moved = len(replacement_moves(self.placement.expert_to_rank, placement.expert_to_rank))
        self.placement = placement
        if moved and state is not None:
            migrate(self._comm, state, self._rename)
        elif moved:
            self._rename()
        return moved

    def _rename(self) -> None:
        for layer, ids_of_rank in zip(self.layers, self.placement.experts_of_rank, strict=True):
            layer.set_ids(ids_of_rank[self._ep_rank].tolist())
