"""The clock of a run, and the learning rate and EMA decay, which are functions of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sdit.config import OptimizerConfig


@dataclass(frozen=True)
class Clock:
    """The progress of a run: `images_seen`, and the number of optimizer `steps`.

    `left_out` are the ranges of samples that rollbacks skipped, as (first, count) by sample index, ascending.
    """

    images_seen: int = 0
    steps: int = 0
    left_out: tuple[tuple[int, int], ...] = ()

    @property
    def first_sample(self) -> int:
        """The index of the next step's first sample: `images_seen` plus the samples skipped before it."""
        return self.sample_at(self.images_seen)

    def sample_at(self, images_seen: int) -> int:
        """Return the sample index after `images_seen` images."""
        index = images_seen
        for first, count in self.left_out:
            index += count if index >= first else 0
        return index

    def leaving_out(self, until: int) -> Clock:
        """Return this clock with the samples from here up to index `until` skipped."""
        return replace(self, left_out=(*self.left_out, (self.first_sample, until - self.first_sample)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Clock:
        """Return the clock from the JSON form of `asdict(clock)`."""
        left_out = tuple((int(first), int(count)) for first, count in values.get("left_out", ()))
        return cls(values["images_seen"], values["steps"], left_out)

    def after(self, global_batch: int) -> Clock:
        """Return the clock one optimizer step later."""
        return replace(self, images_seen=self.images_seen + global_batch, steps=self.steps + 1)

    def crosses(self, earlier: Clock, every_images: int | None, every_steps: int | None) -> bool:
        """Return True if a multiple of the interval is in (earlier, now]. Without an interval return False."""
        if every_images is not None:
            return self.images_seen // every_images > earlier.images_seen // every_images
        return every_steps is not None and self.steps // every_steps > earlier.steps // every_steps


@dataclass(frozen=True)
class StepSpan:
    """One optimizer step, from the clock `before` to `clock`. The run has `length_images` images."""

    before: Clock
    clock: Clock
    length_images: int

    @property
    def at_end(self) -> bool:
        """True if the step is the last one of the run."""
        return self.clock.images_seen >= self.length_images

    def crosses(self, every_images: int | None, every_steps: int | None = None) -> bool:
        """Return True if the step completes an interval. Without an interval return False."""
        return self.clock.crosses(self.before, every_images, every_steps)


def learning_rate_factor(config: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """Return the learning rate over its peak for the step that ends at `images_seen`.

    It rises linearly during the warm-up and then decays until the end.
    """
    if images_seen < config.warmup_images:
        return images_seen / config.warmup_images
    if config.decay == "constant":
        return 1.0
    start = config.warmup_images  # of the decay
    if config.decay_images is not None:
        start = max(start, total_images - config.decay_images)
    progress = min(1.0, max(0.0, (images_seen - start) / max(1, total_images - start)))
    shape = (1.0 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1.0 - progress
    return config.final_ratio + (1.0 - config.final_ratio) * shape


def ema_decay(decay: float, has_warmup: bool, steps: int) -> float:
    """Return the decay of the EMA update after optimizer step `steps` (from 1). With warm-up it is small at first."""
    return min(decay, (1 + steps) / (10 + steps)) if has_warmup else decay


def power_decay(gamma: float, span: StepSpan) -> float:
    """Return the decay of the update of a power-function average after a step; 0 after the first step of a run.

    Source: Karras et al. 2024 (EDM2), eq. 127.
    """
    return (span.before.images_seen / span.clock.images_seen) ** (gamma + 1.0)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma > 0 of the power-function average of relative width `sigma_rel` in (0, 12^-0.5).

    It is the largest real root of a cubic. Source: Karras et al. 2024 (EDM2), eq. 123.
    """
    inverse = sigma_rel**-2
    # With gamma = s - 7/3 the cubic is s^3 - 3 p s - 2 q = 0, which has three real roots for these sigma_rel.
    p, q = (1.0 + 3.0 * inverse) / 9.0, -(1.0 + 18.0 * inverse) / 27.0
    return 2.0 * math.sqrt(p) * math.cos(math.acos(q / p**1.5) / 3.0) - 7.0 / 3.0
