"""The experts of a model on the ranks of their group: which rank owns which, the local weights, and moves between ranks.

M experts of a block, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sdit.config import ModelConfig
from sdit.distributed.comm import Comm
from sdit.expert_parallel.migration import MigratableState, migrate
from sdit.expert_parallel.placement import ExpertPlacement, experts_moved
from sdit.expert_parallel.sharded_experts import ShardedExperts, TrainedShardedExperts
from sdit.model import DiffusionTransformer
from sdit.model.layer import Router
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import build_experts, build_token_experts
from sdit.model.moe.token_moe import TokenMoe


class PlacedExperts:
    """The experts of one kind: their `placement`, and the `layers` of local experts, one per block (none if P = 1).

    `owner` is the type of the modules with such experts, `keys` those of the owners and of the replicas in a checkpoint.
    `is_restored`: the placement is a checkpoint's. `starts_random`: the run begins with random weights, not with given ones.
    """

    owner: ClassVar[type[Router] | type[TokenMoe]]
    keys: ClassVar[tuple[str, ...]]

    def __init__(self, model: ModelConfig, comm: Comm, ranks: int, ep_rank: int) -> None:
        self._config, self._comm, self._ranks, self._ep_rank = model, comm, ranks, ep_rank
        blocks, count = self._shape()
        in_order = np.tile(np.arange(count) // (count // ranks), (blocks, 1))
        self.placement = ExpertPlacement(in_order, np.zeros(in_order.shape, dtype=bool), ranks)
        self.layers: tuple[ShardedExperts, ...] = ()
        self.is_restored = False
        self.starts_random = True

    def _shape(self) -> tuple[int, int]:
        """Return the number of blocks of the placement, and M."""
        raise NotImplementedError

    def _build(self, ids: Sequence[int]) -> Experts:
        """Return the experts of a block with these ids."""
        raise NotImplementedError

    def _owners(self, model: DiffusionTransformer) -> list[Any]:
        return [each for each in model.modules() if isinstance(each, self.owner)]

    def cut(self, model: DiffusionTransformer, is_random: bool) -> None:
        """Leave each block of a model on the meta device the experts of this rank."""
        self.starts_random = is_random
        owners = self._owners(model)
        if self._ranks > 1:
            for owner, ids_of_rank in zip(owners, self.placement.experts_of_rank[: len(owners)], strict=True):
                owner.experts = self._build(ids_of_rank[self._ep_rank])

    def wrap(self, model: DiffusionTransformer) -> None:
        """Put the local experts of each block into the layer that DeepSpeed finds."""
        if self._ranks == 1:
            return
        owners, count = self._owners(model), self.placement.expert_to_rank.shape[1]
        is_trained = any(parameter.requires_grad for owner in owners for parameter in owner.experts.parameters())
        layer = TrainedShardedExperts if is_trained else ShardedExperts
        self.layers = tuple(layer(owner.experts, count, self._ranks) for owner in owners)
        for owner, sharded in zip(owners, self.layers, strict=True):
            owner.experts = sharded
        self._place()

    def stored(self) -> dict[str, Any]:
        """Return the placement as a checkpoint carries it."""
        values = self.placement.expert_to_rank.tolist(), self.placement.replicated.tolist()
        return dict(zip(self.keys, values, strict=False))

    def restore(self, stored: dict[str, Any]) -> None:
        """Use a checkpoint's placement if it was made for as many ranks, blocks and experts. Called before `cut`."""
        if stored["ranks"] != self._ranks or not all(stored.get(key) for key in self.keys):
            return
        present = self.placement.expert_to_rank
        owners, *others = (np.array(stored[key]) for key in self.keys)
        replicated = others[0] if others else np.zeros(present.shape)
        if owners.shape != present.shape or replicated.shape != present.shape:
            return
        if (np.sort(owners) != np.sort(present)).any():
            return
        self.placement = ExpertPlacement(owners, replicated.astype(bool), self._ranks)
        self.is_restored = True

    def agree(self, placement: ExpertPlacement) -> ExpertPlacement:
        """Return rank 0's placement on all ranks. A tie that ranks break differently would hang the exchange."""
        owners, replicated = self._comm.from_first([placement.expert_to_rank.tolist(), placement.replicated.tolist()])
        return ExpertPlacement(np.array(owners), np.array(replicated, dtype=bool), placement.ranks)

    def adopt(self, placement: ExpertPlacement, state: MigratableState | None) -> int:
        """Change the placement on all ranks, and return how many experts moved. The numbers of the run do not change.

        `state` None: all experts, their moments and averages are still zero, so that only their ids move.
        """
        moved = experts_moved(self.placement.expert_to_rank, placement.expert_to_rank)
        self.placement = placement
        if moved and state is not None:
            migrate(self._comm, state, self._place)
        elif moved:
            self._place()
        return moved

    def _place(self) -> None:
        for layer, experts_of_rank in zip(self.layers, self.placement.experts_of_rank[: len(self.layers)], strict=True):
            layer.place(experts_of_rank, self._ep_rank)


class SampleRoutedExperts(PlacedExperts):
    """The experts of Switch-DiT. A model without them has a placement of one expert per rank, in which nothing moves."""

    owner, keys = Router, ("place", "at_hand")  # keys of checkpoint format 1

    def _shape(self) -> tuple[int, int]:
        return self._config.depth, self._config.experts.count if self._config.variant == "switch" else self._ranks

    def _build(self, ids: Sequence[int]) -> Experts:
        return build_experts(self._config.experts, self._config.width, ids)


class TokenRoutedExperts(PlacedExperts):
    """The experts of `model.moe`, which are never replicated. Their placement has the blocks with such experts."""

    owner, keys = TokenMoe, ("token_place",)

    def _shape(self) -> tuple[int, int]:
        moe = self._config.moe
        return len(self._config.moe_blocks), self._ranks if moe is None else moe.experts

    def _build(self, ids: Sequence[int]) -> Experts:
        assert self._config.moe is not None
        return build_token_experts(self._config.moe, self._config.width, ids)
