"""Periodic tasks: when they are due, a stop that interrupts them, and what the next launch repeats."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.clock import Clock, StepSpan
from sdit.config import Config, resolve_run
from sdit.model import build_model
from sdit.supervise.heartbeat import Heartbeat
from sdit.train.catch_up import catch_up
from sdit.train.context import TrainContext
from sdit.train.events import SAMPLES, Observer, Observers
from sdit.train.guards import StopAgreed
from sdit.train.sampling import GridSampler, RoutingMaps
from sdit.train.tasks import PeriodicTasks
from sdit.train.timing import StepTimer

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
    device, world, rank = torch.device("cpu"), 1, 0

    def interleave_on_first(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows

    def from_first(self, value: Any) -> Any:
        return value

    def sum(self, values: Any) -> Any:
        return values


def context_at(clock: Clock, keeper: Keeper) -> tuple[TrainContext, GridSampler]:
    """One rank with a small DiT, whose grid is due every EVERY images; sampling takes three steps."""
    config = Config.model_validate(
        {
            "model": {"variant": "dit", "depth": 1, "width": 32, "heads": 2, "patch_size": 4, "input_size": 8}
            | {"channels": 1, "classes": 2},
            "train": {"steps": STEPS, "global_batch": BATCH},
            "sample": {"every_images": EVERY, "steps": 3, "classes": 1, "images_per_class": 1},
        }
    )
    state = SimpleNamespace(
        clock=clock, length_images=STEPS * BATCH, last_batch=BATCH, ema=SimpleNamespace(values=[]),
        prior=SimpleNamespace(columns=None),
    )  # fmt: skip
    engine = SimpleNamespace(weights_of=lambda _values: nullcontext())
    parts: dict[str, Any] = {
        "run": resolve_run(config, {}, "none", 1, 1), "comm": OneRank(), "engine": engine, "model": build_model(config.model),
        "objective": None, "experts": None, "loader": None, "state": state, "observers": Observers([keeper]),
        "heartbeat": Heartbeat(), "signals": SimpleNamespace(requested=False), "timer": StepTimer(torch.device("cpu")),
    }  # fmt: skip
    context = TrainContext(**parts)
    return context, GridSampler(context, config.sample, np.zeros(1, np.int64), None)


def tasks_of(context: TrainContext, sampler: GridSampler) -> PeriodicTasks:
    never: Any = SimpleNamespace(due=lambda _span: False)
    return PeriodicTasks(never, never, never, RoutingMaps(context, sampler, None), sampler)


@pytest.mark.parametrize(
    ("images", "attempt", "drawn", "events"),
    [
        (0, 1, [], []),
        (EVERY, 1, [EVERY], ["made_up"]),
        (EVERY + BATCH, 1, [], []),  # no grid is due there
        (EVERY, 2, [], ["not_made_up"]),  # the first attempt may have ended in sampling
        (STEPS * BATCH, 1, [STEPS * BATCH], ["made_up"]),
    ],
)
def test_missing_output_is_repeated_once_a_launch(
    images: int, attempt: int, drawn: list[int], events: list[str]
) -> None:
    keeper = Keeper()
    for _ in range(2):  # the second time nothing is missing
        context, sampler = context_at(Clock(images, images // BATCH), keeper)
        catch_up(context, tasks_of(context, sampler), attempt)
    assert keeper.drawn == drawn and keeper.events == events * attempt


def test_a_stop_ends_sampling_at_the_step_in_which_it_is_requested() -> None:
    keeper = Keeper()
    context, sampler = context_at(Clock(EVERY, 4), keeper)
    steps: list[int] = []

    def requested(_self: object) -> bool:
        steps.append(len(steps))
        return len(steps) == 2

    context = replace(context, signals=type("Signals", (), {"requested": property(requested)})())
    with pytest.raises(StopAgreed):
        GridSampler(context, context.run.config.sample, np.zeros(1, np.int64), None).draw()
    assert len(steps) == 2, "the third step is not taken"
    images, labels, columns = sampler.draw()
    assert images.shape == (1, 1, 8, 8) and labels.tolist() == [0] and columns == 1


def test_a_routing_map_is_due_with_the_grid_or_at_its_own_interval() -> None:
    context, sampler = context_at(Clock(), Keeper())
    switch: Any = SimpleNamespace(config=SimpleNamespace(variant="switch"))
    at_grid = StepSpan(Clock(EVERY - BATCH, 3), Clock(EVERY, 4), STEPS * BATCH)
    between = StepSpan(Clock(EVERY, 4), Clock(EVERY + BATCH, 5), STEPS * BATCH)
    at_end = StepSpan(Clock((STEPS - 1) * BATCH, STEPS - 1), Clock(STEPS * BATCH, STEPS), STEPS * BATCH)
    assert not RoutingMaps(context, sampler, BATCH).due(at_end), "a plain DiT has no experts"
    context = replace(context, model=switch)
    assert [RoutingMaps(context, sampler, None).due(span) for span in (at_grid, between, at_end)] == [True, False, True]
    assert [RoutingMaps(context, sampler, BATCH).due(span) for span in (at_grid, between)] == [True, True]
