"""Bytes that token-routed experts send and keep, for even and independent choices.

L tokens of an image, D width, H hidden width, M experts of a block, k of a token, EP ranks.
"""

from __future__ import annotations

import math

import numpy as np

from sdit.config import MoeConfig
from sdit.planner.layout import DeviceKind, Job

WEIGHT_BYTES = 4  # the weights of a token are sent in float32
INDEX_BYTES = 8


def token_exchange_bytes(job: Job, device: DeviceKind) -> tuple[float, int]:
    """Return the expected bytes of rows per step over all ranks, and those that a rank keeps of rows for backward.

    It keeps the tokens that it received, and which tokens it sent. On a GPU, with a capacity, buffers have as many rows as it
    allows. The exchange of sizes is not counted.
    """
    moe, model, ranks = job.config.model.moe, job.config.model, job.expert_parallel
    if moe is None or ranks == 1:
        return 0.0, 0
    local, limit = moe.experts // ranks, moe.limit(model.tokens) if device == "cuda" else None
    served = served_share(moe, model.tokens, local) if limit is None else min(1.0, local * limit / model.tokens)
    rows = len(model.moe_blocks) * job.batch.micro_batch * model.tokens * (ranks - 1) * served
    row, weights = model.width * job.element_bytes, local * WEIGHT_BYTES
    forwards = 1 if job.config.parallel.activation_checkpointing == "none" else 2
    # A row with its weights there and a sum back; backward sends their gradients.
    sent = (forwards + 1) * rows * (2 * row + weights) * job.world * job.batch.accumulation
    # A sent row keeps two indices and a mask, a received one the token, its weights twice, and a mask.
    kept = rows * (row + 2 * weights + 2 * INDEX_BYTES + 2 * local)
    return sent, int(kept) if forwards == 1 else 0


def token_expert_activations(job: Job, device: DeviceKind) -> float:
    """Return the bytes that the token-routed experts of a block keep of one image for backward, without received tokens.

    A pair keeps its `pair_numbers`. Experts without a grouped product run one after another, and backward computes the
    activation and the result again (`sdit.model.moe.token_products`): a pair then keeps its hidden numbers and an index.
    Sharded experts compute no dropped pair, but on a GPU as many pairs as the capacity allows.
    """
    moe, model, ranks = job.config.model.moe, job.config.model, job.expert_parallel
    if moe is None:
        return 0.0
    pairs = moe.experts_per_token(model.tokens) * model.tokens
    if ranks > 1:
        limit = moe.limit(model.tokens) if device == "cuda" else None
        pairs = pairs * kept_share(moe, model.tokens) if limit is None else moe.experts * limit
    if device == "cuda" and job.element_bytes == 2:
        return job.element_bytes * pairs * pair_numbers(moe, model.width)
    hidden = (2 if moe.kind == "swiglu" else 1) * moe.hidden(model.width)
    weights = moe.experts // ranks * WEIGHT_BYTES if ranks > 1 else 0  # of the local experts
    return pairs * (job.element_bytes * hidden + INDEX_BYTES) + model.tokens * (moe.experts + weights)


def pair_numbers(moe: MoeConfig, width: int) -> int:
    """Return how many numbers of a (token, expert) pair autograd keeps: the token, two results, and the hidden layers."""
    return 3 * width + (3 if moe.kind == "swiglu" else 2) * moe.hidden(width)


def kept_share(moe: MoeConfig, tokens: int) -> float:
    """Return the share of chosen pairs that the capacity keeps, for samples of `tokens` tokens. The others are dropped.

    The load of an expert in a sample is binomial.
    """
    limit, chance = moe.limit(tokens), moe.top_k / moe.experts
    if moe.router == "expert_choice" or limit is None or limit == tokens:
        return 1.0
    from scipy.special import bdtr  # slow to import: not for runs without a capacity

    # The mean of min(load, limit) is the sum of P(load > n) for n < limit.
    return float((1 - bdtr(np.arange(limit), tokens, chance)).sum() / (tokens * chance))


def served_share(moe: MoeConfig, tokens: int, local: int) -> float:
    """Return the share of tokens that any of `local` experts of one rank computes, for samples of `tokens` tokens."""
    if moe.router == "expert_choice":
        taken = moe.limit(tokens)
        assert taken is not None
        return 1 - (1 - taken / tokens) ** local
    dropped, others = 1 - kept_share(moe, tokens), moe.experts - local
    ways = (math.comb(local, n) * math.comb(others, moe.top_k - n) * dropped**n for n in range(moe.top_k + 1))
    return 1 - sum(ways) / math.comb(moe.experts, moe.top_k)
