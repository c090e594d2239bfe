"""Floating-point operations of the networks.

L tokens, D width, H hidden width, M experts of a block, k experts used per block. A product of (a, b) and (b, c)
counts as 2abc. Element-wise operations are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from sdit.config import ModelConfig
from sdit.model.embedding import SINUSOID_SIZE


class Flops(NamedTuple):
    """FLOPs of one image: of a forward pass, and of a training step. The backward pass counts as two forward passes."""

    forward: int
    train: int


def flops_per_image(config: ModelConfig) -> Flops:
    """Return the FLOPs that the mathematics requires: the numerator of model-FLOPs utilization.

    Recomputation is not counted. Linear experts count as one product with their merged matrix, plus the merging of k
    matrices.
    """
    tokens, width = config.tokens, config.width
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width  # qkv and projection, scores and weighted sum
    mlp = (3 if config.ffn == "swiglu" else 2) * tokens * width * config.hidden
    modulation = 6 * width * width
    block = attention + modulation + (_experts(config) if config.variant == "switch" else 0)
    moes = len(config.moe_blocks)
    mlps = (config.depth - moes) * mlp + moes * _token_experts(config)
    patch = tokens * config.patch_size**2 * config.channels * width
    time = SINUSOID_SIZE * width + width * width
    final = tokens * width * config.patch_size**2 * config.out_channels + 2 * width * width
    forward = 2 * (patch + time + config.depth * block + mlps + final)
    return Flops(forward, 3 * forward)


def expert_flops_per_image(config: ModelConfig) -> Flops:
    """Return the FLOPs of one image in the gates and experts of all blocks. They are a part of `flops_per_image`."""
    forward = 2 * config.depth * _experts(config) if config.variant == "switch" else 0
    return Flops(forward, 3 * forward)


def _token_experts(config: ModelConfig) -> int:
    """Return the multiplications of gate, token-routed and shared experts of one block, without drops."""
    moe, width, tokens = config.moe, config.width, config.tokens
    if moe is None:
        return 0
    hidden = round(moe.experts_per_token(tokens) * tokens) * moe.hidden(width) + tokens * moe.shared_hidden(width)
    return tokens * width * moe.experts + (3 if moe.kind == "swiglu" else 2) * width * hidden


def _experts(config: ModelConfig) -> int:
    """Return the multiplications of the gate and the experts of one block."""
    experts, width, tokens = config.experts, config.width, config.tokens
    gate = width * experts.count
    if experts.kind == "linear":
        return gate + tokens * width * width + experts.top_k * (width * width + width)
    return gate + experts.top_k * 2 * tokens * width * experts.hidden(width)
