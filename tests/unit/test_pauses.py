"""Pauses between two steps: made up for once a launch where they are due and missing, and cut short by a stop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdit.config import Config
from sdit.supervise.heartbeat import Heartbeat
from sdit.train.clock import Clock
from sdit.train.events import SAMPLES, Observer
from sdit.train.guards import StopAgreed
from sdit.train.pauses import Pauses
from sdit.train.timing import StepTimes

BATCH, EVERY, STEPS = 32, 128, 100


class Keeper(Observer):
    """Lacks its grid until it is drawn."""

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.events: list[str] = []

    def missing(self, clock: Clock) -> set[str]:
        return set() if clock.images_seen in self.drawn else {SAMPLES}

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        self.drawn.append(clock.images_seen)

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self.events.append(kind)


class OneRank:
    device = "cpu"

    def from_first(self, value: Any) -> Any:
        return value

    def sum(self, values: Any) -> Any:
        return values


class ThreeSteps:
    """A sampler of three steps; somebody asks for a stop after the second."""

    def __init__(self) -> None:
        self.signals, self.stops, self.steps = SimpleNamespace(requested=False), False, 0

    def draw(self, engine: object, ema: object, step_done: Any) -> tuple[np.ndarray, np.ndarray]:
        for step in range(3):
            self.steps += 1
            self.signals.requested = self.stops and step == 1
            step_done()
        return np.zeros((1, 1, 8, 8), np.float32), np.zeros(1, np.int64)


def pauses_at(clock: Clock, keeper: Keeper, attempt: int = 1) -> tuple[Pauses, ThreeSteps]:
    config = Config.model_validate(
        {
            "model": {
                "variant": "dit",
                "depth": 1,
                "width": 32,
                "heads": 2,
                "patch_size": 4,
                "input_size": 8,
                "channels": 1,
            },
            "train": {"steps": STEPS, "global_batch": BATCH},
            "sample": {"every_images": EVERY},
        }
    )
    length = {"length_images": STEPS * BATCH, "last_batch": BATCH}
    sampler, state = ThreeSteps(), SimpleNamespace(clock=clock, ema=None, prior_columns=None, **length)
    parts: Any = (
        config,
        OneRank(),
        None,
        state,
        sampler,
        None,
        [keeper],
        Heartbeat(),
        sampler.signals,
        StepTimes(),
        attempt,
    )
    return Pauses(*parts), sampler


@pytest.mark.parametrize(
    ("images", "attempt", "drawn", "events"),
    [
        (0, 1, [], []),
        (EVERY, 1, [EVERY], ["made_up"]),
        (EVERY + BATCH, 1, [], []),  # no grid is due there
        (EVERY, 2, [], ["not_made_up"]),  # the first attempt may have ended in the drawing
        (STEPS * BATCH, 1, [STEPS * BATCH], ["made_up"]),
    ],
)
def test_what_is_due_and_missing_is_made_up_for_once_a_launch(
    images: int, attempt: int, drawn: list[int], events: list[str]
) -> None:
    keeper = Keeper()
    for _ in range(2):  # the second time nothing is missing
        pauses_at(Clock(images, images // BATCH), keeper, attempt)[0].make_up()
    assert keeper.drawn == drawn and keeper.events == events * attempt


def test_a_stop_ends_the_drawing_at_the_step_it_is_heard() -> None:
    keeper = Keeper()
    pauses, sampler = pauses_at(Clock(EVERY, 4), keeper)
    sampler.stops = True
    with pytest.raises(StopAgreed):
        pauses.draw(Clock(EVERY - BATCH, 3))
    assert sampler.steps == 2 and keeper.drawn == []
