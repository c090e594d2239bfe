"""What is due between two steps: the held-out loss, the sample grid, the routing map.

A stop cuts a pause short, whichever rank it was asked of, and so may a kill; the next launch then makes up for what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sdit.config import Config
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.train.clock import Clock
from sdit.train.events import ROUTING, SAMPLES, VALIDATION, Observer
from sdit.train.guards import StopAgreed, StopSignals
from sdit.train.sampling import GridSampler
from sdit.train.state import RunState
from sdit.train.timing import StepTimes
from sdit.train.validation import Validator


class Pauses:
    """The pauses of one run; all ranks call its methods together. Raises StopAgreed where one is cut short."""

    def __init__(
        self, config: Config, comm: Comm, engine: Engine, state: RunState, sampler: GridSampler,
        validator: Validator | None, observers: Sequence[Observer], pulse: Heartbeat, signals: StopSignals, times: StepTimes,
        attempt: int,
    ) -> None:  # fmt: skip
        self._config, self._comm, self._engine, self._state = config, comm, engine, state
        self._sampler, self._validator, self._observers = sampler, validator, observers
        self._pulse, self._signals, self._times, self._attempt = pulse, signals, times, attempt

    def make_up(self) -> None:
        """At the start of a process: what was due at the clock's present, and its files do not hold.

        Only the first attempt of a launch does so: what ends an attempt each time it is tried may not end the run.
        """
        clock = self._state.clock
        missing: set[str] = set().union(*(observer.missing(clock) for observer in self._observers))
        missing = set(self._comm.from_first(sorted(missing)))
        if not clock.steps:
            return
        before_images = max(0, clock.images_seen - self._state.last_batch)
        before = replace(clock, images_seen=before_images, steps=clock.steps - 1)
        missing &= self._due(before) | ({VALIDATION} if self.validation_due(before) else set())
        if not missing:
            return
        names = f"{' and '.join(sorted(missing))} of {clock.images_seen} images"
        if self._attempt > 1:
            self._tell("not_made_up", f"{names}: an attempt may have ended there; the next launch tries again")
            return
        self._tell("made_up", f"{names}: the run had ended before they were there")
        if VALIDATION in missing:
            measured = self.validate()
            for observer in self._observers:
                observer.on_validation(clock, measured)
        self._draw(missing)

    def validation_due(self, before: Clock) -> bool:
        """Whether the held-out loss is to be measured between `before` and now."""
        if self._validator is None:
            return False
        return self._state.clock.crosses(before, self._config.validation.every_images, None) or self._at_end

    def validate(self) -> dict[str, Any]:
        """The validation keys of metrics.jsonl."""
        assert self._validator is not None
        self._pulse.enter(Phase.SAMPLE, self._state.clock.steps)
        with self._times.part("validation"):
            return self._validator.measure(self._engine, self._state.ema, self._stop_point)

    def draw(self, before: Clock) -> None:
        """The pictures that are due between `before` and now; both at the end of the run."""
        self._draw(self._due(before))

    def _due(self, before: Clock) -> set[str]:
        clock, own_rhythm = self._state.clock, self._config.observe.routing_every_images
        due = set()
        if clock.crosses(before, self._config.sample.every_images, None) or self._at_end:
            due.add(SAMPLES)
        maps = bool(due) if own_rhythm is None else clock.crosses(before, own_rhythm, None)
        if self._config.model.variant == "switch" and (maps or self._at_end):
            due.add(ROUTING)
        return due

    def _draw(self, due: set[str]) -> None:
        state, sample = self._state, self._config.sample
        if ROUTING in due and self._observers:  # milliseconds; the grid may be cut short
            probs = self._sampler.gate_probs()
            for observer in self._observers:
                observer.on_routing(state.clock, probs, state.prior.columns)
        if SAMPLES in due:
            self._pulse.enter(Phase.SAMPLE, state.clock.steps)
            with self._times.part("sample"):
                images, labels = self._sampler.draw(self._engine, state.ema, self._stop_point)
            for observer in self._observers:
                observer.on_samples(state.clock, images, labels, sample.images_per_class)

    def _tell(self, kind: str, text: str) -> None:
        for observer in self._observers:
            observer.on_event(self._state.clock, kind, text)

    @property
    def _at_end(self) -> bool:
        return self._state.clock.images_seen >= self._state.length_images

    def _stop_point(self) -> None:
        """Progress was made inside a pause. Raises: StopAgreed, on all ranks, when any of them was asked to stop."""
        self._pulse.progress()
        asked = torch.tensor([float(self._signals.requested)], device=self._comm.device)
        if self._comm.sum(asked).item():
            raise StopAgreed
