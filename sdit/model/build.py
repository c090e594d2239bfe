"""Builds a model from a config and counts its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from sdit.config import ModelConfig, describe_error
from sdit.errors import ConfigError
from sdit.model.block import Block
from sdit.model.dit import DiffusionTransformer
from sdit.model.layer import Router
from sdit.model.moe.base import Experts
from sdit.model.weights import init_weights


class ParameterCount(NamedTuple):
    """The number of all parameters, and of those that one sample, or a token of it, uses (k of the M experts)."""

    total: int
    active: int


def build_model(
    config: ModelConfig | Mapping[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> DiffusionTransformer:
    """Return the model with initial weights on the device. On device "meta" it has shapes but no weights.

    Raises: ConfigError: if a key has an illegal value. The message names key, value and the legal values.
    """
    config = config if isinstance(config, ModelConfig) else parse_model_config(config)
    with torch.device("meta"):
        model = DiffusionTransformer(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    init_weights(model, seed)
    return model


def parse_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the section `model`, parsed from a plain dict with its keys.

    Raises: ConfigError: if a key has an illegal value. The message names key, value and the legal values.
    """
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"model.{describe_error(error, ModelConfig)}") from None


def count_parameters(model: DiffusionTransformer) -> ParameterCount:
    """Return the number of all parameters and of those that one sample uses. The model may be on the meta device."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    routers = [router.experts for router in model.routers if isinstance(router, Router)]
    unused = _unused(routers, config.experts.top_k)
    if config.moe is not None:
        moes = [block.moe.experts for block in model.blocks if isinstance(block, Block) and block.moe is not None]
        unused += _unused(moes, config.moe.experts_per_token(config.tokens))
    return ParameterCount(total, total - unused)


def _unused(experts: Sequence[Experts], used: float) -> int:
    """Return the parameters of experts that a sample or token does not use, if it uses `used` experts of each block."""
    numel = sum(parameter.numel() for module in experts for parameter in module.parameters())
    local = sum(len(module.ids) for module in experts)
    return int(numel * (local - len(experts) * used) // local) if local else 0
