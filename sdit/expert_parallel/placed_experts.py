"""The experts of a model on the ranks of their group: which rank owns which, the local weights, and moves between ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sdit.config import ModelConfig
from sdit.distributed.comm import Comm
from sdit.expert_parallel.migration import MigratableState, migrate
from sdit.expert_parallel.placement import ExpertPlacement, replacement_moves
from sdit.expert_parallel.sharded_experts import ShardedExperts, TrainedShardedExperts
from sdit.model import DiffusionTransformer
from sdit.model.layer import Router
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import build_experts, build_token_experts
from sdit.model.moe.token_moe import TokenMoe


class PlacedExperts:
    """The `placement` of a run, and the `layers` of local experts, one per block (none if a rank owns all experts).

    `is_restored`: the placement is a checkpoint's. `starts_random`: the run begins with random weights, not with given ones.
    Token-routed experts are always placed in order, and are not among the `layers`.
    """

    def __init__(self, model: ModelConfig, comm: Comm, ranks: int, ep_rank: int) -> None:
        self._config, self._comm, self._ranks, self._ep_rank = model, comm, ranks, ep_rank
        count = model.experts.count if model.variant == "switch" else ranks  # without routers there is nothing to place
        in_order = np.tile(np.arange(count) // (count // ranks), (model.depth, 1))
        self.placement = ExpertPlacement(in_order, np.zeros(in_order.shape, dtype=bool), ranks)
        self.layers: tuple[ShardedExperts, ...] = ()
        self.is_restored = False
        self.starts_random = True

    def shard(
        self, model: DiffusionTransformer, init_weights: Callable[[DiffusionTransformer], None], is_random: bool
    ) -> None:
        """Leave each block of a model on the meta device the experts of this rank, and initialise the weights."""
        self.starts_random = is_random
        routers = [each for each in model.modules() if isinstance(each, Router)]
        moes = [each for each in model.modules() if isinstance(each, TokenMoe)]
        if self._ranks > 1:
            for router, ids_of_rank in zip(routers, self.placement.experts_of_rank[: len(routers)], strict=True):
                router.experts = build_experts(self._config.experts, self._config.width, ids_of_rank[self._ep_rank])
            for moe in moes:
                moe.experts = self._build_token_experts()
        model.to_empty(device=self._comm.device)
        init_weights(model)
        if self._ranks > 1:
            self.layers = self._wrap(routers, self._config.experts.count)
            self._wrap(moes, 0 if self._config.moe is None else self._config.moe.experts)

    def _build_token_experts(self) -> Experts:
        """Return this rank's token-routed experts of a block: equally many consecutive ones."""
        moe = self._config.moe
        assert moe is not None
        local = moe.experts // self._ranks
        return build_token_experts(moe, self._config.width, range(self._ep_rank * local, (self._ep_rank + 1) * local))

    def _wrap(self, owners: Sequence[Router | TokenMoe], count: int) -> tuple[ShardedExperts, ...]:
        """Put the experts of each owner, `count` on all ranks, into the layer that DeepSpeed finds, and return the layers."""
        is_trained = any(parameter.requires_grad for owner in owners for parameter in owner.experts.parameters())
        layer = TrainedShardedExperts if is_trained else ShardedExperts
        layers = tuple(layer(owner.experts, count, self._ranks) for owner in owners)
        for owner, sharded in zip(owners, layers, strict=True):
            owner.experts = sharded  # type: ignore[assignment]
        return layers

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
