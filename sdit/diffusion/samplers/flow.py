"""Samplers of the flow path, from noise at t = 1 to data at t = 0. Each yields x after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from sdit.diffusion.prediction import split_variance
from sdit.diffusion.samplers.clipping import clip_x0
from sdit.diffusion.samplers.settings import SamplerSettings
from sdit.errors import ConfigError

Velocity = Callable[[Tensor, float], Tensor]


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


def euler(velocity: Velocity, x: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield x after each of `steps` equal Euler steps (order 1)."""
    for step in range(steps, 0, -1):
        x = x - velocity(x, step / steps) / steps
        yield x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield x after each of `steps` Heun steps (order 2). They take 2 * steps - 1 evaluations."""
    for step in range(steps, 0, -1):
        first = velocity(x, step / steps)
        ahead = x - first / steps
        if step > 1:
            second = velocity(ahead, (step - 1) / steps)
            x = x - (first + second) / (2 * steps)
        else:
            x = ahead  # the network is not trained at t = 0, and one first-order step keeps order 2
        yield x
