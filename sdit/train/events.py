"""What a run reports: observers get plain numbers and arrays after the step that they belong to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import numpy as np

from sdit.clock import Clock
from sdit.train.record import StepRecord, Validation

SAMPLES, ROUTING, VALIDATION = "samples", "routing", "validation"  # outputs of the periodic tasks
_log = logging.getLogger(__name__)


class OnFailure(Enum):
    """What follows if an observer raises: the run ends, the observer is called again next time, or no longer."""

    RAISE = "raise"
    RETRY = "retry"
    DROP = "drop"


class Observer:
    """Something that watches a run, such as a file of metrics or a progress bar. It overrides the calls it needs.

    Only rank 0 calls it, unless `every_rank` is set. The methods here do nothing.
    """

    every_rank = False
    name = "an observer"
    on_failure = OnFailure.RAISE

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        """The run starts; `message` says whether it is a fresh start or a resume."""

    def on_rollback(self, clock: Clock, text: str) -> None:
        """The run went back to `clock`. Reports of later steps are void."""

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        """An optimizer step was taken; `record.logged` marks those for `metrics.jsonl`."""

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        """The held-out loss of a step that was reported without it, because a stop interrupted validation."""

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        """A grid was sampled: images (n, C, H, W) float32, row by row of `columns`; labels (n,). Only rank 0 gets the images."""

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        """A routing map is due: `probs` (depth, T, M) of all tasks, from the present weights.

        `columns` (depth * M,): the column of the prior's mask that each expert of each block has; None: no prior.
        """

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        """A checkpoint was committed."""

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        """Something happened that a person should know, such as a skipped step or a failed checkpoint."""

    def on_stop(self, clock: Clock) -> None:
        """The run was asked to stop and must end within its grace. From here on `close` may not wait."""

    def missing(self, clock: Clock) -> set[str]:
        """Return which of SAMPLES, ROUTING, VALIDATION this observer keeps and has not got for `clock`."""
        return set()

    def close(self) -> None:
        """The run ends."""


class Observers(Observer):
    """Passes each call on to all observers in order, and contains their failures as each asks (`on_failure`)."""

    every_rank = True

    def __init__(self, observers: Sequence[Observer] = (), is_first: bool = True) -> None:
        self._all = list(observers)
        self._called = [each for each in observers if is_first or each.every_rank]

    def of_rank(self, is_first: bool) -> Observers:
        """Return the same observers, of which only those are called that this rank calls."""
        return Observers(self._all, is_first)

    @property
    def called(self) -> tuple[Observer, ...]:
        """The observers that this rank calls."""
        return tuple(self._called)

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._notify(lambda each: each.on_start(clock, total_images, message))

    def on_rollback(self, clock: Clock, text: str) -> None:
        self._notify(lambda each: each.on_rollback(clock, text))

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        self._notify(lambda each: each.on_step(clock, record))

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        self._notify(lambda each: each.on_validation(clock, validation))

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        self._notify(lambda each: each.on_samples(clock, images, labels, columns))

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        self._notify(lambda each: each.on_routing(clock, probs, columns))

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self._notify(lambda each: each.on_checkpoint(clock, folder, seconds))

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._notify(lambda each: each.on_event(clock, kind, text))

    def on_stop(self, clock: Clock) -> None:
        self._notify(lambda each: each.on_stop(clock))

    def missing(self, clock: Clock) -> set[str]:
        found: set[str] = set()
        self._notify(lambda each: found.update(each.missing(clock)))
        return found

    def close(self) -> None:
        """Close all observers, also those that only rank 0 calls. A failure is logged: it never replaces the run's own error."""
        for each in self._all:
            try:
                each.close()
            except Exception as error:
                _log.warning("%s failed while it was closed (%s: %s)", each.name, type(error).__name__, error)
                _log.debug("%s", each.name, exc_info=True)

    def _notify(self, call: Callable[[Observer], None]) -> None:
        for each in list(self._called):
            self._call(each, call)

    def _call(self, observer: Observer, call: Callable[[Observer], None]) -> None:
        try:
            call(observer)
        except Exception as error:
            if observer.on_failure is OnFailure.RAISE:
                raise
            rest = "training continues"
            if observer.on_failure is OnFailure.DROP:
                self._called = [each for each in self._called if each is not observer]
                self._all = [each for each in self._all if each is not observer]
                rest += " without it"
            _log.warning("%s failed (%s: %s); %s", observer.name, type(error).__name__, error, rest)
            _log.debug("%s", observer.name, exc_info=True)
