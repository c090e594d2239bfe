"""From a config to a model, and its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError

from sdit.config import ModelConfig
from sdit.errors import ConfigError
from sdit.model.dit import DiffusionTransformer
from sdit.model.moe.experts import Experts
from sdit.model.weights import init_weights


class ParameterCount(NamedTuple):
    """Numbers of parameters: all, and those one sample uses (k of the M experts)."""

    total: int
    active: int


def build_model(
    config: ModelConfig | Mapping[str, Any], seed: int = 0, device: torch.device | str = "cpu"
) -> DiffusionTransformer:
    """The model with its initial weights on the device; on "meta" it has shapes only.

    Raises: ConfigError naming key, value and what is legal.
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
    """The validated section of a plain dict with ModelConfig's keys. Raises: ConfigError, one line."""
    try:
        return ModelConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from None


def _explain(item: dict[str, Any]) -> str:
    """`model.key: value: what is legal` of one pydantic error."""
    keys, text = [str(key) for key in item["loc"]], str(item["msg"])
    if item["type"] == "value_error":  # our own validators say key and value themselves
        return ".".join(["model", *keys]) + "." + text.removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        text = "unknown key; legal: " + ", ".join(_legal_keys(keys[:-1]))
    return f"{'.'.join(['model', *keys])}: {item['input']!r}: {text}"


def _legal_keys(path: list[str]) -> list[str]:
    section: type[BaseModel] = ModelConfig
    for key in path:
        annotation = section.model_fields[key].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)


def count_parameters(model: DiffusionTransformer) -> ParameterCount:
    """Parameters of the model (also on the meta device), in all and as one sample uses them."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    in_experts = sum(parameter.numel() for module in experts for parameter in module.parameters())
    held = sum(len(module.ids) for module in experts)
    used = len(experts) * model.config.experts.top_k
    return ParameterCount(total, total - (in_experts * (held - used) // held if held else 0))
