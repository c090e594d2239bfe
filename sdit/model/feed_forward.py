"""The MLPs of a block. B samples, L tokens, D width, H hidden width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D) of `x` (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiluMlp(Mlp):
    """The same with SiLU. The dense blocks of DSMoE have it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D) of `x` (B, L, D)."""
        return self.fc2(F.silu(self.fc1(x)))


class _SiluTimes(torch.autograd.Function):
    """Returns SiLU(a) b for a and b of equal shape. It saves its inputs only; autograd would also save SiLU(a)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), grad * F.silu(a)


def silu_times(a: Tensor, b: Tensor) -> Tensor:
    """Return SiLU(a) b for a and b of equal shape."""
    return _SiluTimes.apply(a, b)


class GatedMlp(nn.Module):
    """A gated MLP without biases, V (SiLU(G x) U x), (B, L, D) -> (B, L, D). The shared experts of DiT-MoE have it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D) of `x` (B, L, D)."""
        return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x)))


class SwiGlu(nn.Module):
    """A gated MLP, W3 (SiLU(a) b) with [a, b] = W12 x, (B, L, D) -> (B, L, D). Source: Shazeer, arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens (B, L, D) of `x` (B, L, D)."""
        return self.w3(silu_times(*self.w12(x).chunk(2, dim=-1)))
