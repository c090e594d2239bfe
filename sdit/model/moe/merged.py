"""Linear experts as one product: sum_j g_j (z W_j + b_j) = z (sum_j g_j W_j) + sum_j g_j b_j."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _merge(gates: Tensor, w: Tensor) -> Tensor:
    """Return the matrices sum_j gates[:, j] w[j], (G, D_in, D_out)."""
    return (gates @ w.flatten(1)).view(len(gates), *w.shape[1:])


class _MergedLinear(torch.autograd.Function):
    """The merged product. It saves only its inputs and recomputes the merged matrices (G D² numbers) in backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(z, gates, w, b)
        return torch.baddbmm((gates @ b)[:, None], z, _merge(gates, w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, gates, w, b = ctx.saved_tensors
        need_z, need_gates, need_w, need_b = ctx.needs_input_grad
        grad_z = grad @ _merge(gates, w).mT if need_z else None
        grad_tokens = grad.sum(1)
        grad_merged = (z.mT @ grad).flatten(1) if need_gates or need_w else None  # (G, D_in D_out)
        grad_gates = grad_merged @ w.flatten(1).T + grad_tokens @ b.T if need_gates else None
        grad_w = (gates.T @ grad_merged).view_as(w) if need_w else None
        grad_b = gates.T @ grad_tokens if need_b else None
        return grad_z, grad_gates, grad_w, grad_b


def merged_linear(z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the mixture (B, L, D_out) of z (B, L, D_in).

    gates: (B, M), or (1, M) for all samples. w: (M, D_in, D_out). b: (M, D_out).
    """
    # Autocast would cast only inside forward, and backward would then mix two dtypes.
    autocast = torch.is_autocast_enabled(z.device.type)
    dtype = torch.get_autocast_dtype(z.device.type) if autocast else w.dtype
    tokens = z if len(gates) == len(z) else z.reshape(1, -1, z.shape[-1])
    mixed = _MergedLinear.apply(tokens.to(dtype), gates.to(dtype), w.to(dtype), b.to(dtype))
    return mixed.view(*z.shape[:-1], w.shape[-1])
