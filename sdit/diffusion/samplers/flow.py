"""Samplers of the flow path, from noise at t = 1 to data at t = 0. Each yields x after each step. Times are host numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from sdit.diffusion.prediction import split_variance
from sdit.diffusion.samplers.clipping import clip_x0
from sdit.diffusion.samplers.settings import SamplerSettings
from sdit.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """A step from time `start` to `end`, closer to the data. `per_unit` is 1 / (start - end)."""

    start: float
    end: float
    per_unit: float


def ode_steps(settings: SamplerSettings) -> Iterator[Step]:
    """Yield the steps of euler and heun, evenly spaced before the shift (SD3, "resolution-dependent shifting")."""
    steps, shift = settings.steps, settings.time_shift
    for step in range(steps, 0, -1):
        start, end = step / steps, (step - 1) / steps
        # The exact 1 / (start - end), which is `steps` without a shift: no rounding of small differences of times.
        per_unit = steps * (1 + (shift - 1) * start) * (1 + (shift - 1) * end) / shift
        yield Step(shifted(start, shift), shifted(end, shift), per_unit)


def sde_times(settings: SamplerSettings) -> list[float]:
    """Return the N + 1 times of sde: N from 1 to `last_step_size`, evenly spaced before the shift, then 0."""
    spacing = (1 - settings.last_step_size) / max(1, settings.steps - 1)
    return [shifted(1 - step * spacing, settings.time_shift) for step in range(settings.steps)] + [0.0]


def shifted(t: float, shift: float) -> float:
    """Return the shifted time. 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def velocity_of(
    predict: Callable[[Tensor, int | float, Tensor], Tensor], y: Tensor, settings: SamplerSettings
) -> Velocity:
    """Return the network as a function dx/dt for t > 0. If `settings` clip x0, the velocity points to the clipped x0."""

    def velocity(x: Tensor, t: float) -> Tensor:
        prediction, variance = split_variance(predict(x, t, y).to(x.dtype), x.shape[1])
        if variance is not None:
            raise ConfigError("model.learn_variance: true has no meaning with diffusion.path flow; legal: false")
        if settings.clip_x0 == "none":
            return prediction
        return (x - clip_x0(x - t * prediction, settings)) / t

    return velocity


def euler(velocity: Velocity, x: Tensor, settings: SamplerSettings) -> Iterator[Tensor]:
    """Yield x after each Euler step (order 1)."""
    for step in ode_steps(settings):
        x = x - velocity(x, step.start) / step.per_unit
        yield x


def heun(velocity: Velocity, x: Tensor, settings: SamplerSettings) -> Iterator[Tensor]:
    """Yield x after each of N Heun steps (order 2). They take 2 N - 1 evaluations."""
    for step in ode_steps(settings):
        first = velocity(x, step.start)
        ahead = x - first / step.per_unit
        if step.end > 0:
            second = velocity(ahead, step.end)
            x = x - (first + second) / (2 * step.per_unit)
        else:
            x = ahead  # the network is not trained at t = 0, and one first-order step keeps order 2
        yield x


def sde(
    velocity: Velocity, x: Tensor, settings: SamplerSettings, noise: Callable[[int, Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yield x after each of N Euler-Maruyama steps of the reverse SDE (SiT, eq. 5). The last adds no noise.

    `noise(step, x)` returns the float32 normal noise of a step. Steps are numbered from N - 1 down to 0.
    """
    times = sde_times(settings)
    for index, (t, end) in enumerate(pairwise(times)):
        step, size = settings.steps - 1 - index, t - end
        v = velocity(x, t)
        if step == 0 and settings.last_step == "euler":
            yield x - size * v
            return
        w = diffusion_coefficient(settings, t)
        score = -(x + (1 - t) * v) / t  # SiT, eq. 9
        x = x - size * (v - w * score)
        if step > 0:
            # The product has the noise's precision, also if x is float64.
            x = x + math.sqrt(2 * w * size) * noise(step, x)
        yield x


def diffusion_coefficient(settings: SamplerSettings, t: float) -> float:
    """Return w(t) of `diffusion_form`, scaled by c = `diffusion_norm` (SiT, table of diffusion coefficients)."""
    c = settings.diffusion_norm
    if settings.diffusion_form == "constant":
        return c
    if settings.diffusion_form == "decreasing":
        return (1 - c * math.cos(math.pi * t)) ** 2 / 4
    if settings.diffusion_form == "increasing-decreasing":
        return c * math.sin(math.pi * t) ** 2
    return c * t  # sigma, also called linear
