"""Shards of float32 state: contiguous ranges of flattened parameters that a rank has in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS: dict[str, tuple[str, ...]] = {  # of an optimizer, by its kind
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
    "sgd": (),
}


@dataclass(frozen=True)
class Shard:
    """`numel` consecutive elements, from `start`, of the flattened parameter `name` with shape `shape`.

    `flat` is the tensor that the optimizer updates and that its state is stored under. The shard begins at `offset` in it.
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
        """The master weights, a float32 view (numel,)."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def has_moment(self, key: str) -> bool:
        """Return True if the optimizer keeps this moment for the shard."""
        return key in self.optimizer.state[self.flat]

    def moment(self, key: str) -> Tensor:
        """Return an optimizer moment, a float32 view (numel,)."""
        state: Tensor = self.optimizer.state[self.flat][key]
        return state.view(-1).narrow(0, self.offset, self.numel)

    def cut(self, start: int, numel: int) -> Shard:
        """Return the intersection of this shard with [start, start + numel) of the parameter."""
        low, high = max(start, self.start), min(start + numel, self.start + self.numel)
        return Shard(self.name, self.shape, low, high - low, self.flat, self.offset + low - self.start, self.optimizer)


@dataclass(frozen=True)
class ReplicaShare:
    """This rank's `index` among the `count` ranks that have the same float32 state of a parameter."""

    index: int
    count: int


def owned_shards(local: Sequence[Shard], replicas: Mapping[str, ReplicaShare]) -> list[Shard]:
    """Return the shards that this rank writes and averages.

    Replicated shards in a row are split equally over the ranks that have them. n shards on P ranks thus give less than n + P
    ranges, and not n P as if each were split.
    """
    totals, positions = Counter[ReplicaShare](), Counter[ReplicaShare]()
    for shard in local:
        totals[replicas[shard.name]] += shard.numel
    owned = []
    for shard in local:
        share = replicas[shard.name]
        numel = -(-totals[share] // share.count)
        own_shard = shard.cut(shard.start + share.index * numel - positions[share], numel)
        positions[share] += shard.numel
        if own_shard.numel > 0:
            owned.append(own_shard)
    return owned
