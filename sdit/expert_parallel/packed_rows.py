"""Rows of tokens joined with their weights, so that one transfer sends both. S rows, D width, C experts of the receiver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNCHOSEN = -torch.inf  # sent as the weight of an expert that was not chosen. No weight has this value.


def pack(rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Return rows (S, D) joined with weights (S, C), in the dtype of the rows. Differentiable.

    No bit of a weight changes: a float32 weight takes the place of two bfloat16 numbers. `chosen` (S, C) is sent as well.
    """
    packed: Tensor = _Pack.apply(rows, weights.masked_fill(~chosen, UNCHOSEN))
    return packed


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pack` was given: rows (S, D), weights (S, C), zero where not chosen, and `chosen` (S, C). Differentiable."""
    rows, weights = _Unpack.apply(packed, width, dtype)
    unchosen = weights == UNCHOSEN
    return rows, weights.masked_fill(unchosen, 0), ~unchosen


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.width, ctx.dtype = rows.shape[1], weights.dtype
        return _join(rows, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _split(grad, ctx.width, ctx.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _split(packed, width, dtype)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, weights: Tensor) -> tuple[Tensor, None, None]:
        return _join(rows, weights), None, None


def _join(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([rows, weights.contiguous().view(rows.dtype)], dim=1)


def _split(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return packed[:, :width], packed[:, width:].contiguous().view(dtype)
