"""The load-balance loss on expected loads. B samples, M experts of a block, k experts used per block."""

from __future__ import annotations

from torch import Tensor

from sdit.contracts import Routing


def balance_loss(routing: Routing, loads: Tensor) -> Tensor:
    """Return the scalar M sum_j f_j P_j, averaged over blocks. It is 1 if the experts are balanced.

    f_j = loads (depth, M) / k has no gradient. P_j is the mean gate probability over the batch. Source: Switch
    Transformer, eq. 4, here with expected loads.
    """
    top_k, experts = routing.experts.shape[-1], routing.gate_probs.shape[-1]
    mean_probs = routing.gate_probs.mean(dim=1)
    return experts * (loads / top_k * mean_probs).sum(-1).mean()
