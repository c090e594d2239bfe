"""Inputs of the transformer: patches, positions, time and label. B samples, L tokens, D width, T timesteps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_SIZE = 256


def sinusoid_frequencies(device: torch.device) -> Tensor:
    """Return f_i = 10000^(-i/128), (128,) float32."""
    half = SINUSOID_SIZE // 2
    return torch.exp(-math.log(10000) / half * torch.arange(half, device=device, dtype=torch.float32))


def sinusoid(time: Tensor) -> Tensor:
    """Return (N, 256) float32 `[cos(t f), sin(t f)]` with f_i = 10000^(-i/128), for times (N,) on the scale 0..T.

    Source: DiT.
    """
    angle = time.float()[:, None] * sinusoid_frequencies(time.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_angles(side: int, count: int, base: int | None = None) -> Tensor:
    """Return coordinate · 10000^(-i/count) for i < count, (side, count) float64.

    The coordinates are 0 .. side - 1. `base` scales them by base / side: a larger grid then has the range of the grid of
    side `base` that was trained.
    """
    frequency = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    coordinate = torch.arange(side, dtype=torch.float64) * ((base or side) / side)
    return coordinate[:, None] * frequency


def grid_positions(side: int, width: int, base: int | None = None) -> Tensor:
    """Return the position embedding (1, side², width) float32.

    The first half of the channels holds sin and cos of the column, the second half those of the row. `base`: see
    `grid_angles`.
    """
    angle = grid_angles(side, width // 4, base)
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (side, D/2)
    column = line[None, :, :].expand(side, side, -1)
    row = line[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, width).float()


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b in float32, also under autocast. The result is an exact function of the stored weights."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


class PatchEmbedding(nn.Module):
    """A p x p convolution of stride p from images (B, C, H, W) to tokens (B, L, D)."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of images `x` (B, C, H, W)."""
        # contiguous, because otherwise the tokens would keep the convolution's channel-major layout in all blocks
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedding(nn.Module):
    """An MLP from times (N,) on the scale 0..T to embeddings (N, D) float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_SIZE, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """Return the embeddings (N, D) float32 of times (N,) on the scale 0..T."""
        first, _, second = self.mlp
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        hidden = F.silu(float_linear(sinusoid(time), first.weight, first.bias))
        return float_linear(hidden, second.weight, second.bias)


class LabelEmbedding(nn.Module):
    """A table from labels (B,) in 0..classes to embeddings (B, D) float32. The label `classes` is the null label."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        # Not by `nn.Embedding(...)`: it draws initial values, which on device "meta" imports torch's compiler.
        self.embedding_table = nn.Embedding.from_pretrained(torch.empty(classes + 1, width), freeze=False)

    def forward(self, y: Tensor) -> Tensor:
        """Return the embeddings (B, D) float32 of labels `y` (B,)."""
        return self.embedding_table(y).float()
