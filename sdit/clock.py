"""The clock of a run, and the learning rate and EMA decay, which are functions of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from sdit.config import EmaConfig, OptimizerConfig


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
    length = max(1, total_images - config.warmup_images)
    progress = min(1.0, (images_seen - config.warmup_images) / length)
    shape = 1.0 - progress if config.decay == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return config.final_ratio + (1.0 - config.final_ratio) * shape


def ema_decay(config: EmaConfig, steps: int) -> float:
    """Return the decay of the EMA update after optimizer step `steps` (from 1). With warm-up it is small at first."""
    return min(config.decay, (1 + steps) / (10 + steps)) if config.warmup else config.decay
