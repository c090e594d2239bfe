"""From the pieces of state a rank holds to the logical tensors of a checkpoint, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdit.parallel.state import Piece

ExpertIds = Callable[
    [str], Sequence[int] | None
]  # parameter name -> global ids of its rows; None: not a stack of experts


@dataclass(frozen=True)
class Span:
    """`numel` elements from `start` of the logical tensor `name` (shape `shape`); they lie at `offset` in the piece."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


def spans_of(piece: Piece, expert_ids: Sequence[int] | None) -> Iterator[Span]:
    """The logical tensors a piece covers: itself, or a part of each expert's row."""
    if expert_ids is None:
        yield Span(piece.name, piece.shape, piece.start, piece.numel, 0)
        return
    row_shape = piece.shape[1:]
    row = math.prod(row_shape)
    end = piece.start + piece.numel
    for index in range(piece.start // row, -(-end // row)):
        low, high = max(piece.start, index * row), min(end, (index + 1) * row)
        yield Span(f"{piece.name}#{expert_ids[index]}", row_shape, low - index * row, high - low, low - piece.start)


def named_spans(
    pieces: Sequence[Piece], values: Sequence[Tensor], expert_ids: ExpertIds
) -> Iterator[tuple[Span, Tensor]]:
    """Every logical span of `pieces` with its view into `values` (one flat tensor per piece)."""
    for piece, flat in zip(pieces, values, strict=True):
        for span in spans_of(piece, expert_ids(piece.name)):
            yield span, flat.narrow(0, span.offset, span.numel)
