"""Linear experts as one product: sum_j g_j (z W_j + b_j) = z (sum_j g_j W_j) + sum_j g_j b_j.

B samples, L tokens, D_in and D_out widths, M experts, G rows of gates (B, or 1 for all samples).

The products are operators of torch.library. `torch.compile` does not look into an operator, so it saves the operator's inputs
for backward, and not the merged matrices (G D_in D_out numbers), which backward computes again. The functions below are the
operators on a CPU, and on a GPU in float32 or without Triton. In bfloat16, `kernels.merged` computes them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdit.model.moe.kernels import has_triton

MIX = "sdit::merged_mix"
GRAD_TOKENS = "sdit::merged_grad_tokens"
GRAD_EXPERTS = "sdit::merged_grad_experts"


def mix(z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the mixture (G, L, D_out) of tokens z (G, L, D_in)."""
    return torch.baddbmm((gates @ b)[:, None], z, _merge(gates, w))


def grad_tokens(grad: Tensor, gates: Tensor, w: Tensor) -> Tensor:
    """Return the gradient (G, L, D_in) of the tokens for the gradient (G, L, D_out) of the mixture."""
    return grad @ _merge(gates, w).mT


def grad_experts(grad: Tensor, z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gates (G, M), w (M, D_in, D_out) and b (M, D_out)."""
    tokens = grad.sum(1)
    merged = (z.mT @ grad).flatten(1)  # (G, D_in D_out)
    return merged @ w.flatten(1).T + tokens @ b.T, (gates.T @ merged).view_as(w), gates.T @ tokens


def _merge(gates: Tensor, w: Tensor) -> Tensor:
    """Return the matrices sum_j gates[:, j] w[j], (G, D_in, D_out)."""
    return (gates @ w.flatten(1)).view(len(gates), *w.shape[1:])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, gates, w, b = ctx.saved_tensors
    needs_tokens, *needs_experts = ctx.needs_input_grad
    of_tokens = torch.ops.sdit.merged_grad_tokens(grad, gates, w) if needs_tokens else None
    if not any(needs_experts):
        return of_tokens, None, None, None
    return of_tokens, *torch.ops.sdit.merged_grad_experts(grad, z, gates, w, b)


def _by_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel that computes the same as `function`. For other dtypes and without Triton, it is `function`."""

    def compute(*inputs: Tensor) -> Any:
        if inputs[0].dtype != torch.bfloat16 or not has_triton():
            return function(*inputs)
        from sdit.model.moe.kernels import merged  # it imports Triton

        return getattr(merged, function.__name__)(*inputs)

    return compute


# `torch.library.custom_op` would do the same, but it imports torch's compiler (1.4 s) at the first call.
torch.library.define(MIX, "(Tensor z, Tensor gates, Tensor w, Tensor b) -> Tensor")
torch.library.define(GRAD_TOKENS, "(Tensor grad, Tensor gates, Tensor w) -> Tensor")
torch.library.define(
    GRAD_EXPERTS, "(Tensor grad, Tensor z, Tensor gates, Tensor w, Tensor b) -> (Tensor, Tensor, Tensor)"
)
for name, function in ((MIX, mix), (GRAD_TOKENS, grad_tokens), (GRAD_EXPERTS, grad_experts)):
    torch.library.impl(name, "default", function)
    torch.library.impl(name, "cuda", _by_kernel(function))
torch.library.register_autograd(MIX, _backward, setup_context=_save_inputs)
torch.library.register_fake(MIX, lambda z, gates, w, b: z.new_empty(*z.shape[:2], w.shape[2]))
torch.library.register_fake(GRAD_TOKENS, lambda grad, gates, w: grad.new_empty(*grad.shape[:2], w.shape[1]))
torch.library.register_fake(
    GRAD_EXPERTS, lambda grad, z, *weights: tuple(weight.new_empty(weight.shape) for weight in weights)
)


def merged_linear(z: Tensor, gates: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return the mixture (B, L, D_out) of z (B, L, D_in).

    gates: (B, M), or (1, M) for all samples. w: (M, D_in, D_out). b: (M, D_out).
    """
    # Autocast would cast only inside the operator, and backward would then mix two dtypes.
    autocast = torch.is_autocast_enabled(z.device.type)
    dtype = torch.get_autocast_dtype(z.device.type) if autocast else w.dtype
    tokens = z if len(gates) == len(z) else z.reshape(1, -1, z.shape[-1])
    mixed: Tensor = torch.ops.sdit.merged_mix(tokens.to(dtype), gates.to(dtype), w.to(dtype), b.to(dtype))
    return mixed.view(*z.shape[:-1], w.shape[-1])
