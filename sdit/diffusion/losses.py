"""The terms of the training loss: the variational bound of a reverse step, and weights of the squared error at each timestep."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sdit.config import DiffusionConfig
from sdit.diffusion.prediction import Prediction
from sdit.diffusion.schedule import DeviceTables
from sdit.errors import ConfigError

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


def direction_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine between velocity and target (B, C, H, W) over the channels, as the mean (B,) over the positions.

    Source: LightningDiT, velocity direction loss.
    """
    return (1 - functional.cosine_similarity(velocity, target, dim=1, eps=1e-8)).flatten(1).mean(1)


class ConstantWeight(nn.Module):
    """A weighting that does not change the errors."""

    def forward(self, mse: Tensor, t: Tensor) -> Tensor:
        """Return the errors (B,) unchanged."""
        return mse


class TimestepWeight(nn.Module):
    """A weighting with one fixed weight per timestep, float64 (T,)."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.tables = DeviceTables(weights)

    def forward(self, mse: Tensor, t: Tensor) -> Tensor:
        """Return the errors (B,) times the weights of their timesteps `t` (B,)."""
        (weight,) = self.tables.at(t)
        return weight * mse


class UncertaintyWeight(nn.Module):
    """The weighting (exp(-s) mse + s) / 2 with a learned log scale s for each of K equal clusters of timesteps (UW).

    `timesteps` is T, or None if t is continuous in [0, 1].

    Raises: ConfigError: if there are more clusters than timesteps.
    """

    def __init__(self, clusters: int, timesteps: int | None) -> None:
        super().__init__()
        if timesteps is not None and clusters > timesteps:
            raise ConfigError(f"diffusion.uw_clusters: {clusters} leaves clusters empty; legal: 1..{timesteps}")
        self.timesteps = timesteps
        self.log_scale = nn.Parameter(torch.zeros(clusters))

    def forward(self, mse: Tensor, t: Tensor) -> Tensor:
        """Return the errors (B,) weighted by the learned scales of their timesteps `t` (B,)."""
        scale = self.log_scale[self.cluster(t)].float()
        return 0.5 * (torch.exp(-scale) * mse + scale)

    def cluster(self, t: Tensor) -> Tensor:
        """Return the cluster (B,) int64 of each timestep: floor(K t / T)."""
        clusters = len(self.log_scale)
        if self.timesteps is None:
            return (t * clusters).long().clamp(max=clusters - 1)
        return t * clusters // self.timesteps


def make_weighting(config: DiffusionConfig, snr: np.ndarray) -> nn.Module:
    """Return the weighting module (mse (B,), t (B,)) -> (B,) of a diffusion path with `snr` (T,)."""
    if config.weighting == "uw":
        return UncertaintyWeight(config.uw_clusters, len(snr))
    if config.weighting == "p2":
        return TimestepWeight(p2_weights(snr, config.p2_k, config.p2_gamma))
    if config.weighting.startswith("min_snr_"):
        gamma = float(config.weighting.removeprefix("min_snr_"))
        return TimestepWeight(min_snr_weights(snr, gamma, config.prediction))
    return ConstantWeight()


def min_snr_weights(snr: np.ndarray, gamma: float, prediction: Prediction) -> np.ndarray:
    """Return min(SNR, gamma) (T,), the weight of an error in x0, converted to the predicted quantity (Min-SNR)."""
    x0_weight = np.minimum(snr, gamma)
    per_x0_error = {"epsilon": snr, "x0": np.ones_like(snr), "v": snr + 1}
    return x0_weight / per_x0_error[prediction]


def p2_weights(snr: np.ndarray, k: float, gamma: float) -> np.ndarray:
    """Return the factor 1 / (k + SNR)^gamma (T,) of the error of the prediction (P2)."""
    return (k + snr) ** -gamma
