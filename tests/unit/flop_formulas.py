"""Lets torch's FLOP counter count the products of merged experts, which are operators of their own, and in-place products.

G samples, L tokens, D_in and D_out widths, M experts: z (G, L, D_in), gates (G, M), w (M, D_in, D_out), b (M, D_out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import sdit.model.moe.merged  # noqa: F401  # defines the operators

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.sdit.merged_mix)
def _mix_flops(z: Shape, gates: Shape, w: Shape, b: Shape, **_: Any) -> int:
    return _merge_flops(gates, w) + 2 * z[0] * z[1] * w[1] * w[2] + 2 * gates[0] * gates[1] * b[1]


@register_flop_formula(torch.ops.sdit.merged_grad_tokens)
def _grad_tokens_flops(grad: Shape, gates: Shape, w: Shape, **_: Any) -> int:
    return _merge_flops(gates, w) + 2 * grad[0] * grad[1] * w[1] * w[2]


@register_flop_formula(torch.ops.sdit.merged_grad_experts)
def _grad_experts_flops(grad: Shape, z: Shape, gates: Shape, w: Shape, b: Shape, **_: Any) -> int:
    product = 2 * grad[0] * grad[1] * w[1] * w[2]
    return product + 2 * _merge_flops(gates, w) + 2 * 2 * gates[0] * gates[1] * b[1]


def _merge_flops(gates: Shape, w: Shape) -> int:
    return 2 * gates[0] * gates[1] * w[1] * w[2]


@register_flop_formula(torch.ops.aten.addmm_)
def _addmm_flops(total: Shape, a: Shape, b: Shape, **_: Any) -> int:
    """The gradients of token-routed experts are added in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]
