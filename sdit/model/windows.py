"""Task windows of DTR (Denoising Task Routing, ICLR 2024): the units that each denoising task may use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.config import ModelConfig
from sdit.time_law import TimeLaw


@dataclass(frozen=True)
class TaskWindows:
    """Task t uses units `starts[t] .. starts[t] + active - 1` of `units`. `starts` (T,) int64 never decreases."""

    starts: np.ndarray
    active: int
    units: int

    @property
    def mask(self) -> np.ndarray:
        """(T, units) bool, True where the task uses the unit."""
        unit = np.arange(self.units)
        start = self.starts[:, None]
        return (unit >= start) & (unit < start + self.active)

    @property
    def tasks_of_units(self) -> tuple[np.ndarray, np.ndarray]:
        """The tasks that use each unit are a range: the first task and the task after the last, (units,) int64 each."""
        unit = np.arange(self.units)
        first = np.searchsorted(self.starts, unit - self.active, side="right")
        return first, np.searchsorted(self.starts, unit, side="right")


def task_windows(timesteps: int, units: int, active: int, alpha: float, law: TimeLaw | None = None) -> TaskWindows:
    """Return windows that slide from the first unit at t = 0 to the last at t = T - 1, by u^alpha.

    u is t / (T - 1), or with a `law` of t its quantile there, F(t / (T - 1)).
    """
    position = np.arange(timesteps) / (timesteps - 1)
    progress = (position if law is None else law.cdf(position)) ** alpha
    return TaskWindows(np.round(progress * (units - active)).astype(np.int64), active, units)


def channel_windows(config: ModelConfig) -> TaskWindows:
    """Return DTR's windows over the width, which mask each block. int(width * beta) channels are active."""
    # 100 * 0.29 is 28.999999999999996 in binary floats. Round before truncating.
    active = int(round(config.width * config.dtr.beta, 6))
    return task_windows(config.timesteps, config.width, active, config.dtr.alpha)


def expert_windows(config: ModelConfig, law: TimeLaw | None = None) -> TaskWindows:
    """Return the diffusion prior's windows over the depth * M experts of all blocks.

    depth * k of them are active (beta = k/M). They follow the quantiles of `law` (`prior.axis: quantile`), or t if it is None.
    """
    units, active = config.depth * config.experts.count, config.depth * config.experts.top_k
    return task_windows(config.timesteps, units, active, config.dtr.alpha, law)
