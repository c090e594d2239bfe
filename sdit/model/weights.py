"""Initial weights: a pure function of (seed, parameter name, expert id), independent of the order of construction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sdit.model.dit import DiffusionTransformer
from sdit.model.embedding import grid_positions
from sdit.model.moe.base import Experts
from sdit.model.moe.token_gate import TokenGate
from sdit.model.windows import channel_windows
from sdit.randomness import named_seed


@torch.no_grad()
def init_weights(model: DiffusionTransformer, seed: int) -> None:
    """Fill all parameters and fixed buffers in place.

    Ranks with different local experts get equal values for all other parameters.
    """
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, TokenGate) and parameter is owner.weight:
            parameter.copy_(_gate_value(name, parameter.shape, seed, owner.config.router))
        elif isinstance(owner, Experts):
            for row, expert in zip(parameter, owner.ids, strict=True):
                row.copy_(initial_value(name, row.shape, seed, expert))
        else:
            parameter.copy_(initial_value(name, parameter.shape, seed))
    fill_buffers(model)


@torch.no_grad()
def fill_buffers(model: DiffusionTransformer) -> None:
    """Compute the fixed buffers, which `to_empty` leaves uninitialised."""
    config = model.config
    if config.positions == "sincos":
        model.pos_embed.copy_(grid_positions(config.side, config.width, config.position_base))
    if model.feat_rope is not None:
        model.feat_rope.fill(config.side, config.position_base)
    if config.variant == "dtr":
        model.channel_mask.copy_(torch.from_numpy(channel_windows(config).mask))


def initial_value(name: str, shape: torch.Size, seed: int, expert: int | None = None) -> Tensor:
    """Return the float32 initial value of a parameter, or of the row of one expert (`expert`: its id in the whole model).

    Matrices are Xavier-uniform, biases are zero and the weights of norms are one. The label table and the timestep MLP are
    N(0, 0.02). The output layer, the last matrix of an expert of a router, and the adaLN modulation are zero, so each block
    starts as an identity (adaLN-Zero).
    """
    if len(shape) == 1 and name.endswith(".weight"):  # of a norm: all other vectors are biases
        return torch.ones(shape)
    if name.endswith(("bias", ".b", ".b1", ".b2")) or _is_zero_matrix(name):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(named_seed(seed, name, expert))
    if name.startswith(("t_embedder.", "y_embedder.")):
        return torch.empty(shape).normal_(std=0.02, generator=generator)
    # Sum of rows and columns. The patch convolution counts as a linear map of flattened patches.
    bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _gate_value(name: str, shape: torch.Size, seed: int, router: Literal["token", "expert_choice"]) -> Tensor:
    """Return the initial weight (M, D) of the gate of token-routed experts.

    It is uniform within 1 / sqrt(D) as in DiT-MoE, or N(0, 0.006) as in EC-DiT for expert choice.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, name, None))
    if router == "expert_choice":
        return torch.empty(shape).normal_(std=0.006, generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _is_zero_matrix(name: str) -> bool:
    is_last_of_router = name.startswith("routers.") and name.endswith((".experts.w", ".w2"))
    return "adaLN_modulation" in name or name.startswith("final_layer.") or is_last_of_router
