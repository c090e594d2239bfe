"""The averaged weights, fp32 and sharded like the optimizer state: each rank averages the pieces it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdit.parallel.state import Piece


class Ema:
    """`values[i]` (numel,) fp32 is the average of `pieces[i].master`."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.values = [piece.master.clone() for piece in pieces]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values <- decay * values + (1 - decay) * masters."""
        masters: list[Tensor] = [piece.master for piece in self.pieces]
        torch._foreach_lerp_(self.values, masters, 1.0 - decay)
