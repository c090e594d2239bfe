"""The load-balance loss on expected loads. B samples, M experts, k used per block."""

from __future__ import annotations

from torch import Tensor

from sdit.contracts import Routing


def balance_loss(routing: Routing, loads: Tensor) -> Tensor:
    """Scalar M sum_j f_j P_j, mean over blocks; 1 when balanced (Switch Transformer, eq. 4, on expected loads).

    f_j = loads (depth, M) / k has no gradient; P_j is the mean gate probability over the batch.
    """
    top_k, experts = routing.experts.shape[-1], routing.gate_probs.shape[-1]
    mean_probs = routing.gate_probs.mean(dim=1)
    return experts * (loads / top_k * mean_probs).sum(-1).mean()
