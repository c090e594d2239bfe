"""Bytes that token-routed experts send, for even and independent choices. M experts of a block, k of a token, EP ranks."""

from __future__ import annotations

import math

from sdit.config import MoeConfig
from sdit.planner.layout import Job

WEIGHT_BYTES = 4  # the weights of a token are sent in float32


def token_exchange_bytes(job: Job) -> tuple[float, int]:
    """Return the expected bytes of rows per step over all ranks, and those of received rows that a rank keeps for backward.

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
    return sent, int(rows * (row + weights)) if forwards == 1 else 0


def served_share(moe: MoeConfig, tokens: int, local: int) -> float:
    """Return the share of tokens that use any of `local` experts of one rank, for samples of `tokens` tokens."""
    if moe.router == "expert_choice":
        taken = moe.limit(tokens)
        assert taken is not None
        return 1 - (1 - taken / tokens) ** local
    return 1 - math.comb(moe.experts - local, moe.top_k) / math.comb(moe.experts, moe.top_k)
