"""The variational bound of one reverse step, as a function of the error of x0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIXEL_HALF_WIDTH = 1 / 255  # half of an 8-bit grey level on [-1, 1]
MIN_PROBABILITY = 1e-12
LOG_2 = math.log(2.0)


def kl_bits(x0_error: Tensor, posterior_x0: Tensor, log_variance: Tensor, model_log_variance: Tensor) -> Tensor:
    """Return KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) per element in bits (DDPM, eq. 5).

    Both means contain the same multiple of x_t, so they differ by `posterior_x0 * x0_error`.
    """
    gap = log_variance - model_log_variance
    distance = (posterior_x0 * x0_error).square() * torch.exp(-model_log_variance)
    return 0.5 * (torch.expm1(gap) - gap + distance) / LOG_2


def decoder_bits(x0: Tensor, x0_error: Tensor, model_log_variance: Tensor) -> Tensor:
    """Return -log2 p(x0 | x_1) per element: the Gaussian's mass on the 8-bit grey level of x0 (DDPM, eq. 13).

    `x0_error` is predicted minus true x0. The lowest and highest levels extend to infinity.
    """
    # Published models were trained with this float32 arithmetic. Far in the upper tail, 1 - cdf rounds to 0 and the
    # bound saturates at MIN_PROBABILITY. An exact tail changes the bound of a bad x0 by about 1 %.
    inverse_deviation = torch.exp(-0.5 * model_log_variance)
    below_upper = _normal_cdf(inverse_deviation * (PIXEL_HALF_WIDTH - x0_error))
    below_lower = _normal_cdf(inverse_deviation * (-PIXEL_HALF_WIDTH - x0_error))
    mass = torch.where(x0 > 0.999, 1 - below_lower, below_upper - below_lower)
    mass = torch.where(x0 < -0.999, below_upper, mass)
    return -mass.clamp(min=MIN_PROBABILITY).log() / LOG_2


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the tanh approximation of the normal CDF that published losses use. Its error is at most 3e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
