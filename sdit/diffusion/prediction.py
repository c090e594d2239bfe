"""The three prediction targets of a network and their conversion to x0, for x_t = alpha x0 + sigma noise."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from sdit.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v"]
Coefficient = TypeVar("Coefficient", float, Tensor)  # a number when all samples fraction t, else (B, 1, 1, 1)


def target_of(kind: Prediction, x0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return the target of the network (B, C, H, W): noise, x0, or v = alpha noise - sigma x0 (v-prediction, app. D)."""
    if kind == "epsilon":
        return noise
    return x0 if kind == "x0" else alpha * noise - sigma * x0


def x0_of(kind: Prediction, x_t: Tensor, prediction: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """Return the x0 (B, C, H, W) that a prediction at x_t implies."""
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    return prediction if kind == "x0" else alpha * x_t - sigma * prediction


def x0_slope(kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the ratio between the error of x0 and the error of the prediction, at a given x_t."""
    if kind == "epsilon":
        return -sigma / alpha
    return torch.ones_like(sigma) if kind == "x0" else -sigma


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return the prediction (B, C, H, W) and the variance's logit in [-1, 1] (B, C, H, W), None if it is not learned.

    Raises: ConfigError: if the output has neither C nor 2C channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance
    legal = f"legal: {channels}, or {2 * channels} with learn_variance"
    raise ConfigError(f"model.channels: the network returned {output.shape[1]} channels for {channels}; {legal}")


def learned_log_variance(variance: Tensor, low: Coefficient, high: Coefficient) -> Tensor:
    """Return the log variance of the reverse step: `low` at -1, `high` at +1 (IDDPM, eq. 15)."""
    fraction = (variance + 1) / 2
    return fraction * high + (1 - fraction) * low
