"""Bytes that token-routed experts send and keep, for even and independent choices.

L tokens of an image, D width, H hidden width, M experts of a block, k of a token, EP ranks.
"""

from __future__ import annotations

import math
from typing import Literal

from sdit.config import MoeConfig
from sdit.planner.layout import Job

WEIGHT_BYTES = 4  # the weights of a token are sent in float32
INDEX_BYTES = 8


def token_exchange_bytes(job: Job) -> tuple[float, int]:
    """Return the expected bytes of rows per step over all ranks, and those of received rows that a rank keeps for backward.

    It keeps tokens that it received, and sums that it received.

    The exchange of sizes, and the rows that a bounded buffer leaves empty, are not counted.
    """
    moe, model, ranks = job.config.model.moe, job.config.model, job.expert_parallel
    if moe is None or ranks == 1:
        return 0.0, 0
    tokens = job.batch.micro_batch * model.tokens
    rows = len(model.moe_blocks) * tokens * (ranks - 1) * served_share(moe, model.tokens, moe.experts // ranks)
    row, weights = model.width * job.element_bytes, moe.experts // ranks * WEIGHT_BYTES
    forwards = 1 if job.config.parallel.activation_checkpointing == "none" else 2
    # A row with its weights there and a sum back; backward sends their gradients.
    sent = (forwards + 1) * rows * (2 * row + weights) * job.world * job.batch.accumulation
    return sent, int(rows * (2 * row + weights + _row_extra(moe.experts // ranks))) if forwards == 1 else 0


def token_expert_activations(job: Job, device: Literal["cuda", "cpu"]) -> float:
    """Return the bytes that the token-routed experts of a block keep of one image for backward, without received tokens.

    A pair keeps its `pair_numbers`. Experts without a grouped product run one after another, and backward computes the
    activation and the result again (`sdit.model.moe.token_products`): a pair then keeps its hidden numbers and an index.
    With EP, a token that the rank computes is kept once more, and its sum once (torch's `index_add_` saves what it adds).
    """
    moe, model, ranks = job.config.model.moe, job.config.model, job.expert_parallel
    if moe is None:
        return 0.0
    pairs = moe.experts_per_token(model.tokens) * model.tokens
    if device == "cuda" and job.element_bytes == 2:
        return job.element_bytes * pairs * pair_numbers(moe, model.width)
    local = moe.experts // ranks
    hidden = (2 if moe.kind == "swiglu" else 1) * moe.hidden(model.width)
    rows = model.tokens * served_share(moe, model.tokens, local) if ranks > 1 else 0
    row = 2 * job.element_bytes * model.width + _row_extra(local)
    return pairs * (job.element_bytes * hidden + INDEX_BYTES) + rows * row + model.tokens * moe.experts


def pair_numbers(moe: MoeConfig, width: int) -> int:
    """Return how many numbers of a (token, expert) pair autograd keeps: the token, two results, and the hidden layers."""
    return 3 * width + (3 if moe.kind == "swiglu" else 2) * moe.hidden(width)


def _row_extra(local: int) -> int:
    """Return the bytes of a computed row without its token: an index, and weights and masks of the local experts."""
    return INDEX_BYTES + local * (WEIGHT_BYTES + 2)


def served_share(moe: MoeConfig, tokens: int, local: int) -> float:
    """Return the share of tokens that use any of `local` experts of one rank, for samples of `tokens` tokens."""
    if moe.router == "expert_choice":
        taken = moe.limit(tokens)
        assert taken is not None
        return 1 - (1 - taken / tokens) ** local
    return 1 - math.comb(moe.experts - local, moe.top_k) / math.comb(moe.experts, moe.top_k)
