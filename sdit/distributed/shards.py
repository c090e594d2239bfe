"""Shards of float32 state: contiguous ranges of flattened parameters that a rank has in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


@dataclass(frozen=True)
class Shard:
    """`numel` consecutive elements, from `start`, of the flattened parameter `name` (shape `shape`).

    `flat` is the tensor that the optimizer steps and keys its state by. The shard begins at `offset` in it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    @property
    def master(self) -> Tensor:
        """float32 view (numel,) of the master weights."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def moment(self, key: str) -> Tensor:
        """float32 view (numel,) of an optimizer moment."""
        state: Tensor = self.optimizer.state[self.flat][key]
        return state.view(-1).narrow(0, self.offset, self.numel)

    def cut(self, start: int, numel: int) -> Shard:
        """The part of this shard inside [start, start + numel) of the parameter."""
        low, high = max(start, self.start), min(start + numel, self.start + self.numel)
        return Shard(self.name, self.shape, low, high - low, self.flat, self.offset + low - self.start, self.optimizer)


@dataclass(frozen=True)
class ReplicaShare:
    """This rank's `index` among the `count` ranks that have the same float32 state of a parameter."""

    index: int
    count: int


def owned_shards(local: Sequence[Shard], replicas: Mapping[str, ReplicaShare]) -> list[Shard]:
    """The shards that this rank writes and averages: replicated ones are split over the ranks that have them."""
    owned = []
    for shard in local:
        share = replicas[shard.name]
        numel = -(-shard.numel // share.count)
        part = shard.cut(shard.start + share.index * numel, numel)
        if part.numel > 0:
            owned.append(part)
    return owned
