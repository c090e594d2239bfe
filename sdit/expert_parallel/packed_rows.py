"""Rows of tokens joined with their weights, so that one transfer sends both, and sums that come back.

N tokens, S rows, D width, C experts of the receiver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNCHOSEN = -torch.inf  # sent as the weight of an expert that was not chosen. No weight has this value.


def pack(x: Tensor, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Return the rows `tokens` (S,) of x (N, D) joined with weights (S, C), in the dtype of x. Differentiable.

    No bit of a weight changes: a float32 weight takes the place of two bfloat16 numbers. `chosen` (S, C) is sent as well.
    """
    return _Pack.apply(x, tokens, weights.masked_fill(~chosen, UNCHOSEN))


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pack` joined: rows (S, D), weights (S, C), zero where not chosen, and `chosen` (S, C). Differentiable."""
    rows, weights = _Unpack.apply(packed, width, dtype)
    unchosen = weights == UNCHOSEN
    return rows, weights.masked_fill(unchosen, 0), ~unchosen


def add_rows(sums: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Return sums (N, D) with rows (S, D) added to those of `tokens` (S,). Differentiable.

    Torch's `index_add` would keep the rows for backward.
    """
    return _AddRows.apply(sums, tokens, rows)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.dtype, width = x.shape, weights.dtype, x.shape[1]
        sent = weights.contiguous().view(x.dtype)
        packed = x.new_empty((len(tokens), width + sent.shape[1]))
        torch.index_select(x, 0, tokens, out=packed[:, :width])
        packed[:, width:] = sent
        return packed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (tokens,) = ctx.saved_tensors
        rows, weights = _split(grad, ctx.shape[1], ctx.dtype)
        return grad.new_zeros(ctx.shape).index_add_(0, tokens, rows), None, weights


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _split(packed, width, dtype)

    @staticmethod
    def backward(ctx: Any, rows: Tensor, weights: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([rows, weights.contiguous().view(rows.dtype)], dim=1), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return sums.index_add(0, tokens, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, tokens)


def _split(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return packed[:, :width], packed[:, width:].contiguous().view(dtype)
