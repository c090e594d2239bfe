"""Splits the local shards of state into the logical tensors of a checkpoint, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdit.distributed.shards import Shard

# Parameter name -> global ids of its rows, or None if it is not a stack of experts.
ExpertIds = Callable[[str], Sequence[int] | None]


@dataclass(frozen=True)
class LogicalShard:
    """`numel` elements, from `start`, of the logical tensor `name` with shape `shape`.

    They begin at `offset` in the shard of the parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


def logical_shards(shard: Shard, expert_ids: Sequence[int] | None) -> Iterator[LogicalShard]:
    """Yield the ranges of logical tensors that a shard covers: the whole shard, or a range of each expert's row."""
    if expert_ids is None:
        yield LogicalShard(shard.name, shard.shape, shard.start, shard.numel, 0)
        return
    row_shape = shard.shape[1:]
    row = math.prod(row_shape)
    end = shard.start + shard.numel
    for index in range(shard.start // row, -(-end // row)):
        low, high = max(shard.start, index * row), min(end, (index + 1) * row)
        yield LogicalShard(
            f"{shard.name}#{expert_ids[index]}", row_shape, low - index * row, high - low, low - shard.start
        )


def shards_with_values(
    shards: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> Iterator[tuple[LogicalShard, Tensor]]:
    """Yield each logical shard of `shards` with its view into `values` (one flat tensor per shard)."""
    for shard, flat in zip(shards, values, strict=True):
        for logical in logical_shards(shard, expert_ids(shard.name)):
            yield logical, flat.narrow(0, logical.offset, logical.numel)
