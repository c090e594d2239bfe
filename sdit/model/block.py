"""The DiT block and its output layer, conditioned by adaLN-Zero (Peebles & Xie 2022). B samples, L tokens, D width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the layer norm (B, L, D) of x, scaled by 1 + scale (B, D) and shifted by shift (B, D).

    The norm has no affine parameters and eps 1e-6.
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return _AddProduct.apply(shift[:, None], normed, 1 + scale[:, None])


class Attention(nn.Module):
    """Multi-head self-attention (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens (B, L, D) of `x` (B, L, D)."""
        rows = self.qkv(x).chunk(3, dim=-1)  # in backward one copy; one view (B, L, 3, heads, D/heads) would need two
        q, k, v = (row.unflatten(-1, (self.heads, -1)).transpose(1, 2) for row in rows)  # each (B, heads, L, D/heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D) of `x` (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP residual branches on tokens (B, L, D).

    The condition (B, D) determines shift, scale and gate of each branch.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the tokens z (B, L, D) with both residual branches added, for the condition c (B, D)."""
        return self.branches(z, self.modulation(c))

    def modulation(self, c: Tensor) -> Tensor:
        """Return shift, scale and gate of both branches (B, 6D) for the condition c (B, D)."""
        return self.adaLN_modulation(c)

    def branches(self, z: Tensor, modulation: Tensor) -> Tensor:
        """Return the tokens z (B, L, D) with both residual branches added."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        z = _AddProduct.apply(z, gate_a[:, None], self.attn(modulated_norm(z, shift_a, scale_a)))
        return _AddProduct.apply(z, gate_m[:, None], self.mlp(modulated_norm(z, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """The output layer: tokens (B, L, D) to the values of their patches (B, L, p² C_out)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the values of the patches (B, L, p² C_out) of tokens z (B, L, D) for the condition c (B, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulated_norm(z, shift, scale))
