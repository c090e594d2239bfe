"""The gates of all blocks: they see only the timestep embedding. G samples, D width, M experts, k experts used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.model.embedding import float_linear


def gate_probabilities(t_emb: Tensor, gates: Sequence[nn.Linear]) -> Tensor:
    """(depth, G, M) float32 softmax(Linear(SiLU(t_emb))) of every block's gate, for t_emb (G, D) float32."""
    # One GEMM for all blocks; always float32, or bf16 rounding would move samples between experts.
    weight, bias = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
    logits = float_linear(F.silu(t_emb), weight, bias)
    return logits.view(len(t_emb), len(gates), -1).transpose(0, 1).softmax(dim=-1)


def sparse_gates(probs: Tensor, experts: Tensor, kept: Tensor | None = None) -> Tensor:
    """(depth, G, M): probs (depth, G, M) where an expert is chosen and kept, zero elsewhere; not renormalised."""
    chosen = probs.gather(-1, experts)
    if kept is not None:
        chosen = chosen * kept
    return torch.zeros_like(probs).scatter(-1, experts, chosen)
