"""The periodic tasks of a run."""

from __future__ import annotations

from dataclasses import dataclass

from sdit.train.checkpoints import Checkpoints
from sdit.train.sampling import GridSampler, RoutingMaps
from sdit.train.validation import Validator


@dataclass(frozen=True)
class PeriodicTasks:
    """What a run does between two steps. Each task says itself when it is due."""

    validator: Validator
    checkpoints: Checkpoints
    routing: RoutingMaps
    sampler: GridSampler
