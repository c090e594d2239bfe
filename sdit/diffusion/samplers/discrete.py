"""Samplers of the diffusion path: single steps of ddpm and ddim, and the two-step DPM-Solver++."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sdit.diffusion.draws import draw_step_noise
from sdit.diffusion.prediction import learned_log_variance, split_variance, x0_of
from sdit.diffusion.samplers.clipping import clip_x0
from sdit.diffusion.samplers.settings import SamplerSettings
from sdit.diffusion.schedule import Schedule
from sdit.randomness import Indices

Predict = Callable[[Tensor, int | float, Tensor], Tensor]  # (x, t, y) -> (B, C_out, H, W); all samples share t


@dataclass(frozen=True)
class Denoised:
    """The network's estimate at x_t: `x0` (clipped), the `epsilon` that is consistent with it, the variance's logit."""

    x0: Tensor
    epsilon: Tensor
    variance: Tensor | None


class ReverseProcess:
    """A network with a thinned schedule. The coefficients are Python floats, because all samples share the step."""

    def __init__(self, predict: Predict, y: Tensor, settings: SamplerSettings, seed: int, indices: Indices) -> None:
        self.predict, self.y, self.settings = predict, y, settings
        self.seed, self.indices = seed, indices
        self.schedule: Schedule = settings.thinned_schedule()

    @property
    def steps(self) -> range:
        """The steps from the noisiest one down to 0."""
        return range(self.settings.steps - 1, -1, -1)

    def denoise(self, x: Tensor, step: int) -> Denoised:
        """Return the predicted x0 and noise (B, C, H, W) of `x` (B, C, H, W) at a step, and the learned variance if any."""
        output = self.predict(x, int(self.schedule.timesteps[step]), self.y).to(x.dtype)
        prediction, variance = split_variance(output, x.shape[1])
        alpha, sigma = float(self.schedule.alpha[step]), float(self.schedule.sigma[step])
        x0 = clip_x0(x0_of(self.settings.prediction, x, prediction, alpha, sigma), self.settings)
        return Denoised(x0, (x - alpha * x0) / sigma, variance)

    def posterior(self, x: Tensor, step: int) -> tuple[Tensor, Tensor | float]:
        """Return mean (B, C, H, W) and log variance of the reverse step (DDPM, eq. 7; IDDPM, eq. 15)."""
        denoised, schedule = self.denoise(x, step), self.schedule
        mean = float(schedule.posterior_x0[step]) * denoised.x0 + float(schedule.posterior_x_t[step]) * x
        low, high = float(schedule.log_variance_low[step]), float(schedule.log_variance_high[step])
        if denoised.variance is not None:
            return mean, learned_log_variance(denoised.variance, low, high)
        return mean, low if self.settings.fixed_variance == "small" else high

    def noise(self, x: Tensor, step: int) -> Tensor:
        """Return normal noise like `x`, a function of seed, sample index and step."""
        return draw_step_noise(self.seed, self.indices, step, x).to(x.dtype)


def ddpm_step(process: ReverseProcess, x: Tensor, step: int) -> Tensor:
    """Return x after one ancestral step (DDPM, algorithm 2). The last step, step 0, adds no noise."""
    mean, log_variance = process.posterior(x, step)
    if step == 0:
        return mean
    deviation = math.exp(0.5 * log_variance) if isinstance(log_variance, float) else (0.5 * log_variance).exp()
    return mean + deviation * process.noise(x, step)


def ddim_step(process: ReverseProcess, x: Tensor, step: int) -> Tensor:
    """Return x after one DDIM step (DDIM, eq. 12 and 16).

    It is deterministic at eta = 0 and has the small variance of ddpm at eta = 1.
    """
    schedule = process.schedule
    denoised = process.denoise(x, step)
    kept = float(schedule.alpha_bar_previous[step])
    variance = process.settings.eta**2 * math.exp(schedule.log_variance_low[step]) if step > 0 else 0.0
    mean = math.sqrt(kept) * denoised.x0 + math.sqrt(1 - kept - variance) * denoised.epsilon
    return mean + math.sqrt(variance) * process.noise(x, step) if variance > 0 else mean


def single_steps(
    advance: Callable[[ReverseProcess, Tensor, int], Tensor], process: ReverseProcess, x: Tensor
) -> Iterator[Tensor]:
    """Yield x after each step of a one-step sampler."""
    for step in process.steps:
        x = advance(process, x, step)
        yield x


def dpm_solver_2m(process: ReverseProcess, x: Tensor) -> Iterator[Tensor]:
    """Yield x after each step of the second-order two-step solver over half the log-SNR (DPM-Solver++, algorithm 2)."""
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    half_log_snr = 0.5 * np.log(process.schedule.snr)
    previous_x0: Tensor | None = None
    previous_h = math.inf
    for step in process.steps:
        x0 = process.denoise(x, step).x0
        if step == 0:
            # The log-SNR of clean data is infinite. The exact step ends at x0, and no slope is extrapolated.
            yield x0
            return
        h = float(half_log_snr[step - 1] - half_log_snr[step])
        midway = x0 if previous_x0 is None else x0 + (x0 - previous_x0) * (0.5 * h / previous_h)
        x = float(sigma[step - 1] / sigma[step]) * x - float(alpha[step - 1]) * math.expm1(-h) * midway
        previous_x0, previous_h = x0, h
        yield x
