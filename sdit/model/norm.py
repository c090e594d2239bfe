"""Norms of tokens and of attention heads, and adaLN's shift, scale and gate. B samples, L tokens, D width, d of a head."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
HEAD_LAYER_EPSILON = 1e-5  # of LightningDiT's LayerNorm on queries and keys


class _AddProduct(torch.autograd.Function):
    """Returns a + b c. The backward pass of `torch.addcmul` first multiplies b and c by 1, which is a pass over the tokens."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(b, c)
        ctx.shape = a.shape
        return torch.addcmul(a, b, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, c = ctx.saved_tensors
        return grad.sum_to_size(ctx.shape), (grad * c).sum_to_size(b.shape), (grad * b).sum_to_size(c.shape)


def add_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b c, with the broadcast rules of torch."""
    return _AddProduct.apply(a, b, c)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x²) + 1e-6), times `weight`, over the last dimension. The mean is computed in float32."""
    if weight is not None:
        x = x.to(weight.dtype)  # under autocast x has half precision and the weight does not
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


class ModulatedNorm(nn.Module):
    """A norm of tokens (B, L, D), scaled by 1 + scale and shifted by adaLN: norm(x) (1 + scale) + shift.

    `layer` has no parameters, `rms` a learned `weight` (D,).
    """

    def __init__(self, width: int, kind: Literal["layer", "rms"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if kind == "rms" else None

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of x (B, L, D) for shift (B, D) and scale (B, D)."""
        gain = 1 + scale[:, None]
        if self.weight is None:
            return add_product(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=EPSILON), gain)
        # The weight goes into the gain, (B, 1, D), which saves a pass over the tokens forward and two backward.
        return add_product(shift[:, None], rms_norm(x), gain * self.weight)


class HeadNorm(nn.Module):
    """A norm of the d channels of each head of queries or keys (..., d), with one weight (d,) for all heads."""

    def __init__(self, width: int, kind: Literal["rms", "layer"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x (..., d)."""
        if self.bias is None:
            return rms_norm(x, self.weight)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, HEAD_LAYER_EPSILON)
