"""Outputs that were due at the present clock when an earlier process ended, and are missing."""

from __future__ import annotations

from dataclasses import replace

from sdit.clock import StepSpan
from sdit.train.context import TrainContext
from sdit.train.events import ROUTING, SAMPLES, VALIDATION
from sdit.train.tasks import PeriodicTasks


def catch_up(context: TrainContext, tasks: PeriodicTasks, attempt: int) -> None:
    """Repeat what was due at the present clock and is missing. All ranks call this at the start of a process.

    A stop signal or a kill can interrupt validation or sampling. Only the first attempt of a launch repeats it: if it
    ends the attempt each time, the run must still continue.
    Raises: StopAgreed.
    """
    state, observers = context.state, context.observers
    clock = state.clock
    missing = set(context.comm.from_first(sorted(observers.missing(clock))))
    if not clock.steps:
        if attempt == 1 and context.run.config.train.init_from is not None and tasks.validator.is_on:
            found = tasks.validator.measure()
            loss = f"validation_loss {found.validation_loss:.9g} of the initial weights"
            context.event("initial_validation", f"{loss}, {found.validation_images} images")
        return
    before = replace(clock, images_seen=max(0, clock.images_seen - state.last_batch), steps=clock.steps - 1)
    span = StepSpan(before, clock, state.length_images)
    due = {VALIDATION: tasks.validator.due(span), ROUTING: tasks.routing.due(span), SAMPLES: tasks.sampler.due(span)}
    missing &= {name for name, is_due in due.items() if is_due}
    if not missing:
        return
    names = f"{' and '.join(sorted(missing))} of {clock.images_seen} images"
    if attempt > 1:
        context.event("not_made_up", f"{names}: an attempt may have ended there; the next launch tries again")
        return
    context.event("made_up", f"{names}: the run had ended before they were there")
    if VALIDATION in missing:
        observers.on_validation(clock, tasks.validator.measure())
    if ROUTING in missing and observers.called:
        observers.on_routing(clock, *tasks.routing.measure())
    if SAMPLES in missing:
        observers.on_samples(clock, *tasks.sampler.draw())
