"""What the trainer tells the world: observers get plain numbers and arrays, after the step they speak of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdit.train.clock import Clock

SAMPLES, ROUTING, VALIDATION = "samples", "routing", "validation"  # what a run makes between two steps


class Observer:
    """Something that watches a run (metrics file, progress bar, pictures); overrides the calls it cares for.

    Called on rank 0 only, unless `every_rank` is set; the methods here do nothing.
    """

    every_rank = False

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        """The run starts, afresh or resumed, as `message` says."""

    def on_rollback(self, clock: Clock, text: str) -> None:
        """The run went back to `clock`: what was told of later steps is void."""

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        """An optimizer step was taken; `metrics` has the keys of metrics.jsonl, `logged` marks those for the file."""

    def on_validation(self, clock: Clock, metrics: dict[str, Any]) -> None:
        """The held-out loss of a step that was told of without it, because a stop came between."""

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        """A grid was sampled: images (n, C, H, W) float32, row by row of `columns`."""

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        """It is time for a routing map: `probs` (depth, T, M) of all tasks, from the present weights.

        `columns` (depth * M,): the column of the prior's mask that each expert of each block has; None: no prior.
        """

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        """A checkpoint was committed."""

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        """Something happened that a person should know (skipped step, loss spike, failed checkpoint)."""

    def on_stop(self, clock: Clock) -> None:
        """The run was asked to stop and is to leave within its grace: `close` may not wait for anything."""

    def missing(self, clock: Clock) -> set[str]:
        """Asked when a process starts: of SAMPLES, ROUTING, VALIDATION, what this observer keeps and lacks of `clock`."""
        return set()

    def close(self) -> None:
        """The run ends."""
