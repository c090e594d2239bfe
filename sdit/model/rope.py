"""Rotary position embedding over rows and columns (EVA-02, LightningDiT). L tokens, d channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdit.model.embedding import grid_angles


def rope_tables(side: int, width: int, base: int | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin (side², width) float32 of the angles of a head's channels, for tokens in row-major order.

    The first half of the channels turns with the row, the second half with the column. Channels 2i and 2i + 1 of a half are a
    pair with one angle: coordinate · 10000^(-2i / (width / 2)). `base`: see `grid_angles`.
    """
    line = grid_angles(side, width // 4, base).repeat_interleave(2, dim=1)  # (side, d/2)
    row = line[:, None, :].expand(side, side, -1)
    column = line[None, :, :].expand(side, side, -1)
    angle = torch.cat([row, column], dim=-1).reshape(side * side, width)
    return angle.cos().float(), angle.sin().float()


class RotaryEmbedding(nn.Module):
    """Turns pairs of channels by angles that depend on the token's row and column. A model has one for all blocks."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        for name in ("freqs_cos", "freqs_sin"):  # LightningDiT's names
            self.register_buffer(name, torch.empty(tokens, width))

    def fill(self, side: int, base: int | None) -> None:
        """Compute the tables, which `to_empty` leaves uninitialised."""
        cos, sin = rope_tables(side, self.freqs_cos.shape[1], base)
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., L, d) with each pair (a, b) of channels turned to (a cos - b sin, b cos + a sin)."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)
