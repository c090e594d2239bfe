"""The averaged weights, fp32 and sharded like the optimizer state: each rank averages the shards it owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sdit.clock import StepSpan, ema_decay, gamma_of, power_decay
from sdit.config import EmaConfig
from sdit.distributed.shards import Shard


@dataclass(frozen=True)
class Average:
    """One average of the weights: `values[i]` (numel,) fp32 averages `shards[i].master`.

    `kind` names it in checkpoints. `decay_of` returns the decay of a step's update, a function of the clock only.
    """

    kind: str
    decay_of: Callable[[StepSpan], float]
    values: list[Tensor]


class Ema:
    """All averages of a run. `values` are those of `ema.decay`, which sampling and validation use."""

    def __init__(self, config: EmaConfig, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._masters: list[Tensor] = [shard.master for shard in shards]  # views, which DeepSpeed updates in place
        self.constant = [
            self._begin(kind, partial(_constant_decay, decay, config.warmup))
            for kind, decay in config.constant_decays.items()
        ]
        self.power = [
            self._begin(kind, partial(power_decay, gamma_of(sigma_rel))) for kind, sigma_rel in config.widths.items()
        ]
        self.values = self.constant[0].values

    def _begin(self, kind: str, decay_of: Callable[[StepSpan], float]) -> Average:
        return Average(kind, decay_of, [master.clone() for master in self._masters])

    @property
    def averages(self) -> list[Average]:
        """All averages. The first one is that of `ema.decay`."""
        return [*self.constant, *self.power]

    @torch.no_grad()
    def update(self, span: StepSpan) -> None:
        """After the step `span`, set each average to decay * average + (1 - decay) * masters."""
        for average in self.averages:
            torch._foreach_lerp_(average.values, self._masters, 1.0 - average.decay_of(span))

    @torch.no_grad()
    def restart(self, average: Average) -> None:
        """Set an average to the present weights."""
        torch._foreach_copy_(average.values, self._masters)


def _constant_decay(decay: float, has_warmup: bool, span: StepSpan) -> float:
    return ema_decay(decay, has_warmup, span.clock.steps)
