"""Compiles the layers of a model, or recomputes them in backward."""

from __future__ import annotations

from typing import Literal

import torch

from sdit.config import Config
from sdit.model import DiffusionTransformer
from sdit.model.moe.kernels import has_triton
from sdit.model.moe.token_moe import TokenMoe


def wrap_layers(model: DiffusionTransformer, config: Config, device: torch.device) -> None:
    """Compile the layers, or recompute them in backward, as the config asks."""
    if compiles_blocks(config.parallel.compile, device):
        for module in model.modules():
            if isinstance(module, TokenMoe):  # it would be compiled again for each block and each number of tokens
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        for layer in model.layers:
            layer.compile()
    if config.parallel.activation_checkpointing != "none":
        from fairscale.nn.checkpoint import checkpoint_wrapper

        offload = config.parallel.activation_checkpointing == "offload"
        model.layers = tuple(checkpoint_wrapper(layer, offload_to_cpu=offload) for layer in model.layers)


def compiles_blocks(wanted: bool | Literal["auto"], device: torch.device) -> bool:
    """Return True if the blocks are compiled. Under `auto` they are compiled on GPUs, if Triton can build its launchers there."""
    if wanted != "auto":
        return wanted
    return device.type == "cuda" and has_triton()
