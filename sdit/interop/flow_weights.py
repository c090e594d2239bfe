"""Converts published weights of flow models to weights of sdit's networks, which take another time.

sdit's flow: x_t = (1 - t) x0 + t noise, with velocity noise - x0. C channels, p patch size, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sdit.errors import ConfigError
from sdit.interop.names import published_names
from sdit.model.embedding import SINUSOID_SIZE, sinusoid_frequencies

TIME, PATCHES = "t_embedder.mlp.0.weight", "x_embedder.proj.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
# Code base -> whether its t is 1 at the data. Its velocity is then x0 - noise.
DATA_AT_ONE = {"lightningdit": True, "sit": True, "dsmoe": True, "diffmoe": True, "dit_moe": False}
# The keys of the section `model` that converted weights need: their networks embed t in [0, 1] itself.
FLOW_MODEL = {"time_scale": 1.0, "learn_variance": False}


@torch.no_grad()
def convert_flow_weights(mapping: Mapping[str, Tensor | np.ndarray], source: str) -> dict[str, Tensor]:
    """Return weights by published name with which sdit's network predicts the velocity noise - x0 at sdit's t.

    Build the model with the keys of `FLOW_MODEL`. The converted network is the same function, to rounding.

    Args:
        mapping: the published weights, tensors or arrays of any float dtype.
        source: the code base that trained them: lightningdit, sit, dsmoe, diffmoe or dit_moe.

    Raises: ConfigError: if the source is unknown, or the weights are not those of such a network.
    """
    if source not in DATA_AT_ONE:
        raise ConfigError(f"source: {source!r} is not known; legal: {', '.join(DATA_AT_ONE)}")
    try:
        weights = {name: torch.as_tensor(values) for name, values in published_names(mapping, "ema").items()}
    except ValueError as error:
        raise ConfigError(f"source: {source}: {error}") from None
    missing = [name for name in (TIME, PATCHES, *OUTPUT) if name not in weights]
    if missing or weights[PATCHES].dim() != 4:
        raise ConfigError(f"source: {source}, but the weights have no {(missing or [PATCHES])[0]} of such a network")
    _, channels, patch, _ = weights[PATCHES].shape
    for name in OUTPUT:
        weights[name] = _velocity_rows(name, weights[name], channels, patch)
    if DATA_AT_ONE[source]:
        weights[TIME] = _reverse_time(weights[TIME])
        weights |= {name: -weights[name] for name in OUTPUT}
    return weights


def _velocity_rows(name: str, values: Tensor, channels: int, patch: int) -> Tensor:
    """Return the rows (p² C, ...) of the velocity. The output layer may have C spare channels, which nothing reads."""
    rows = patch**2 * channels
    if len(values) == rows:
        return values
    if len(values) != 2 * rows:
        raise ConfigError(f"{name} has {len(values)} rows; legal: {rows}, or {2 * rows} with spare channels")
    return values[torch.arange(2 * rows) % (2 * channels) < channels]


def _reverse_time(weight: Tensor) -> Tensor:
    """Return the weight (D, 256) that gives for the sinusoid of 1 - t what `weight` gives for that of t, as float32 or wider.

    cos((1 - t) f) = cos f cos(t f) + sin f sin(t f) and sin((1 - t) f) = sin f cos(t f) - cos f sin(t f).
    """
    if weight.dim() != 2 or weight.shape[1] != SINUSOID_SIZE:
        raise ConfigError(f"{TIME} has shape {tuple(weight.shape)}; legal: {SINUSOID_SIZE} columns")
    frequency = sinusoid_frequencies(weight.device).double()
    cos, sin = weight.double().chunk(2, dim=1)
    new_cos, new_sin = cos * frequency.cos() + sin * frequency.sin(), cos * frequency.sin() - sin * frequency.cos()
    return torch.cat([new_cos, new_sin], dim=1).to(torch.promote_types(weight.dtype, torch.float32))
