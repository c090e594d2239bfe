"""The gates of all blocks. Their input is the timestep embedding only. G samples, D width, M experts, k experts used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit.model.embedding import float_linear


def gate_probabilities(t_emb: Tensor, gates: Sequence[nn.Linear]) -> Tensor:
    """Return the gate probabilities softmax(Linear(SiLU(t_emb))) of all blocks, (depth, G, M) float32.

    `t_emb` is (G, D) float32.
    """
    # One GEMM for all blocks. Always float32, because bf16 rounding would move samples between experts.
    weight, bias = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
    logits = float_linear(F.silu(t_emb), weight, bias)
    return logits.view(len(t_emb), len(gates), -1).transpose(0, 1).softmax(dim=-1)


def sparse_gates(probs: Tensor, experts: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return probs (depth, G, M), set to zero where an expert is not chosen or not kept. They are not renormalised."""
    chosen = probs.gather(-1, experts)
    if kept is not None:
        chosen = chosen * kept
    return torch.zeros_like(probs).scatter(-1, experts, chosen)
