"""From the shards of state a rank holds to the logical tensors of a checkpoint, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdit.distributed.shards import Shard

ExpertIds = Callable[
    [str], Sequence[int] | None
]  # parameter name -> global ids of its rows; None: not a stack of experts


@dataclass(frozen=True)
class Span:
    """`numel` elements from `start` of the logical tensor `name` (shape `shape`); they begin at `offset` in the shard."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


def spans_of(shard: Shard, expert_ids: Sequence[int] | None) -> Iterator[Span]:
    """The logical tensors a shard covers: itself, or a part of each expert's row."""
    if expert_ids is None:
        yield Span(shard.name, shard.shape, shard.start, shard.numel, 0)
        return
    row_shape = shard.shape[1:]
    row = math.prod(row_shape)
    end = shard.start + shard.numel
    for index in range(shard.start // row, -(-end // row)):
        low, high = max(shard.start, index * row), min(end, (index + 1) * row)
        yield Span(f"{shard.name}#{expert_ids[index]}", row_shape, low - index * row, high - low, low - shard.start)


def named_spans(
    shards: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> Iterator[tuple[Span, Tensor]]:
    """Every logical span of `shards` with its view into `values` (one flat tensor per shard)."""
    for shard, flat in zip(shards, values, strict=True):
        for span in spans_of(shard, expert_ids(shard.name)):
            yield span, flat.narrow(0, span.offset, span.numel)
