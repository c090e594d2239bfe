"""What the network's output means: the three targets and the way back to x0, for x_t = alpha x0 + sigma noise."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from sdit.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v"]
Coefficient = TypeVar("Coefficient", float, Tensor)  # a number when all samples share t, else (B, 1, 1, 1)


def target_of(kind: Prediction, x0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """What the network should return (B, C, H, W); v = alpha noise - sigma x0 (v-prediction, app. D)."""
    if kind == "epsilon":
        return noise
    return x0 if kind == "x0" else alpha * noise - sigma * x0


def x0_of(kind: Prediction, x_t: Tensor, prediction: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The x0 (B, C, H, W) that a prediction at x_t stands for."""
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    return prediction if kind == "x0" else alpha * x_t - sigma * prediction


def x0_slope(kind: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Error of x0 over the error of the prediction that it comes from, at a given x_t."""
    if kind == "epsilon":
        return -sigma / alpha
    return torch.ones_like(sigma) if kind == "x0" else -sigma


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction (B, C, H, W) and, if the network learns it, the variance's logit in [-1, 1] (B, C, H, W)."""
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance
    legal = f"legal: {channels}, or {2 * channels} with learn_variance"
    raise ConfigError(f"model.channels: the network returned {output.shape[1]} channels for {channels}; {legal}")


def learned_log_variance(variance: Tensor, low: Coefficient, high: Coefficient) -> Tensor:
    """Log variance of the reverse step, between `low` at -1 and `high` at +1 (IDDPM, eq. 15)."""
    share = (variance + 1) / 2
    return share * high + (1 - share) * low
