"""Discrete noise schedules as float64 tables, on host and device, and their reduction to fewer sampling steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdit.errors import ConfigError

Spacing = Literal["even", "leading", "log_snr"]

BETA_START, BETA_END = 1e-4, 0.02  # of the linear schedule, at T = 1000
MAX_BETA = 0.999  # of the cosine schedule, because beta would reach 1 at the last timestep


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process x_t = alpha_t x0 + sigma_t noise in S steps. Each table is float64 (S,).

    `timesteps` (S,) int64 is the timestep input of the network at each step. It is 0..T-1 unless the schedule is thinned.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        """The fraction alpha_t^2 of the signal's variance in x_t."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alpha_bar_previous(self) -> np.ndarray:
        """`alpha_bar` one step closer to the data. It is 1 at step 0."""
        return np.append(1.0, self.alpha_bar[:-1])

    @cached_property
    def alpha(self) -> np.ndarray:
        """The factor of the signal x0 in x_t, the square root of `alpha_bar`."""
        return np.sqrt(self.alpha_bar)

    @cached_property
    def sigma(self) -> np.ndarray:
        """The factor of the noise in x_t, the square root of 1 - `alpha_bar`."""
        return np.sqrt(1.0 - self.alpha_bar)

    @cached_property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio alpha^2 / sigma^2."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_x0(self) -> np.ndarray:
        """The coefficient of x0 in the mean of q(x_{t-1} | x_t, x0) (DDPM, eq. 7)."""
        return self.betas * np.sqrt(self.alpha_bar_previous) / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_x_t(self) -> np.ndarray:
        """The coefficient of x_t in the mean of q(x_{t-1} | x_t, x0) (DDPM, eq. 7)."""
        return (1.0 - self.alpha_bar_previous) * np.sqrt(1.0 - self.betas) / (1.0 - self.alpha_bar)

    @cached_property
    def log_variance_low(self) -> np.ndarray:
        """The log variance of q(x_{t-1} | x_t, x0), the smallest that the reverse step can have (DDPM, eq. 7)."""
        variance = self.betas * (1.0 - self.alpha_bar_previous) / (1.0 - self.alpha_bar)
        # The variance is 0 at step 0, so its log is that of step 1 (IDDPM). A single step has only beta.
        variance[0] = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(variance)

    @cached_property
    def log_variance_high(self) -> np.ndarray:
        """Log beta, the largest log variance that the reverse step can have."""
        return np.log(self.betas)

    def thinned(self, steps: int, spacing: Spacing) -> Schedule:
        """Return the process that visits only `steps` of the timesteps. alpha_bar does not change there (IDDPM, sec. 4).

        Raises: ConfigError: if `steps` is not in 1..T.
        """
        kept = self._spaced(steps, spacing)
        alpha_bar = self.alpha_bar[kept]
        betas = 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        return Schedule(betas, self.timesteps[kept])

    def _spaced(self, steps: int, spacing: Spacing) -> np.ndarray:
        """Return the ascending positions int64 (steps,) to keep.

        `even` includes both ends, 0 and T-1 (IDDPM, sec. 4). `leading` takes the first position of each of `steps` equal
        ranges (DDIM). `log_snr` is evenly spaced in log-SNR between both ends, rounded to distinct timesteps (DPM-Solver).
        """
        total = len(self.betas)
        if not 1 <= steps <= total:
            raise ConfigError(f"steps: {steps} is not possible with {total} timesteps; legal: 1..{total}")
        if steps == 1:
            return np.array([total - 1])  # the step that starts at pure noise
        position = np.arange(steps)
        if spacing == "leading":
            return position * total // steps
        if spacing == "even":
            return np.rint(position * ((total - 1) / (steps - 1))).astype(np.int64)
        falling = np.log(self.snr)
        wanted = np.interp(-np.linspace(falling[0], falling[-1], steps), -falling, np.arange(total))
        distinct = np.maximum.accumulate(np.rint(wanted).astype(np.int64) - position) + position
        return np.minimum(distinct, total - steps + position)


def make_schedule(kind: Literal["linear", "cosine"], timesteps: int = 1000) -> Schedule:
    """Return the full process of T `timesteps`: linear in beta (DDPM, sec. 4) or cosine in alpha_bar (IDDPM, eq. 17).

    Raises: ConfigError: if there are too few timesteps.
    """
    if timesteps < 2:
        raise ConfigError(f"timesteps: {timesteps} is too few; legal: >= 2")
    betas = _linear_betas(timesteps) if kind == "linear" else _cosine_betas(timesteps)
    return Schedule(betas, np.arange(timesteps))


def _linear_betas(timesteps: int) -> np.ndarray:
    scale = 1000 / timesteps  # so that the last alpha_bar does not depend on T
    if scale * BETA_END >= 1:
        legal = f"legal: more than {int(1000 * BETA_END)}, or schedule cosine"
        raise ConfigError(f"timesteps: {timesteps} is too few for schedule linear; {legal}")
    return np.linspace(scale * BETA_START, scale * BETA_END, timesteps)


def _cosine_betas(timesteps: int) -> np.ndarray:
    offset = 0.008  # otherwise the first betas are too small (IDDPM, sec. 3.2)
    position = np.arange(timesteps + 1) / timesteps
    alpha_bar = np.cos((position + offset) / (1 + offset) * (math.pi / 2)) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)


class DeviceTables:
    """Rows of float64 (T,), copied to a device once. They are not module buffers, which `.bfloat16()` would round."""

    def __init__(self, *rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(np.stack(rows))
        self._on_device: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return the float32 values (B,) of each row at timesteps `t` (B,) int64, without a device synchronisation."""
        rows = self._on_device.get(t.device)
        if rows is None:
            rows = self._on_device[t.device] = self._rows.to(t.device)
        return rows[:, t].float().unbind()
