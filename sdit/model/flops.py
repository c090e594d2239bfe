"""Floating-point operations of the networks. L tokens, D width, H hidden width, M experts, k experts used per block.

A product of (a, b) and (b, c) counts 2abc; what is done element by element does not count.
"""

from __future__ import annotations

from typing import NamedTuple

from sdit.config import ModelConfig

SINUSOID_SIZE = 256  # input of the timestep embedding


class Flops(NamedTuple):
    """Of one image: a forward pass, and a training step (forward and backward, which is twice a forward)."""

    forward: int
    train: int


def flops_per_image(config: ModelConfig) -> Flops:
    """What the mathematics asks for, the numerator of model-FLOPs utilization: recomputation does not count.

    Linear experts count as the one product that their k matrices merge into, and the merging of k matrices.
    """
    tokens, width, hidden = config.tokens, config.width, int(config.width * config.mlp_ratio)
    attention = tokens * (4 * width * width) + 2 * tokens * tokens * width  # qkv and projection; scores and their use
    mlp = 2 * tokens * width * hidden
    modulation = 6 * width * width
    block = attention + mlp + modulation + (_experts(config) if config.variant == "switch" else 0)
    patch = tokens * config.patch_size**2 * config.channels * width
    time = SINUSOID_SIZE * width + width * width
    final = tokens * width * config.patch_size**2 * config.out_channels + 2 * width * width
    forward = 2 * (patch + time + config.depth * block + final)
    return Flops(forward, 3 * forward)


def _experts(config: ModelConfig) -> int:
    """Multiplications of one block's gate and experts."""
    experts, width, tokens = config.experts, config.width, config.tokens
    gate = width * experts.count
    if experts.kind == "linear":
        return gate + tokens * width * width + experts.top_k * (width * width + width)
    return gate + experts.top_k * 2 * tokens * width * int(width * experts.mlp_ratio)
