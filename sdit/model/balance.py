"""The load-balance losses: on expected loads, and on the loads of tokens. B samples, M experts, k experts used per block."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdit.contracts import Routing, TokenPass
from sdit.model.moe.token_routes import TokenStatistics


def balance_loss(routing: Routing, loads: Tensor) -> Tensor:
    """Return the scalar M sum_j f_j P_j, averaged over blocks. It is 1 if the experts are balanced.

    f_j = loads (depth, M) / k has no gradient. P_j is the mean gate probability over the batch. Source: Switch
    Transformer, eq. 4, here with expected loads.
    """
    top_k, experts = routing.experts.shape[-1], routing.gate_probs.shape[-1]
    mean_probs = routing.gate_probs.mean(dim=1)
    return experts * (loads / top_k * mean_probs).sum(-1).mean()


def token_balance_loss(
    statistics: TokenStatistics, scope: Literal["sample", "batch"], tokens: TokenPass | None = None
) -> Tensor:
    """Return the scalar M sum_j f_j P_j, summed over the blocks of `statistics` (blocks, B, M). Each adds 1 if it is balanced.

    f_j is the share of all choices that go to expert j, without gradient, and P_j the mean score. They are those of each
    sample, whose losses are averaged, or those of the batch. `tokens` sums the choices of a batch over the ranks (None: of this
    process only); the mean of the losses, and of their gradients, over the ranks is then that of the whole batch.
    Source: Switch Transformer, eq. 4; DeepSeek-V2, arXiv 2405.04434, eq. 23 (sample).
    """
    probs, counts, experts = statistics.probs, statistics.counts, statistics.counts.shape[-1]
    if scope == "batch":
        probs, counts = probs.mean(1, keepdim=True), counts.sum(1, keepdim=True)
        counts = counts if tokens is None else tokens.sum_over_ranks(counts)
    share = counts / counts.sum(-1, keepdim=True)
    return experts * (share * probs).sum(-1).mean(1).sum()


def updated_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Return the biases (..., M) of gates after a step in which the experts were chosen `counts` (..., M) times.

    An expert that was chosen less often than the mean becomes more likely. Source: Wang et al., arXiv 2408.15664, algorithm 1.
    """
    # M c_j is compared with the sum, because the mean of whole numbers may be rounded.
    excess = counts.sum(-1, keepdim=True) - counts.shape[-1] * counts
    return bias + rate * excess.sign().to(bias.dtype)
