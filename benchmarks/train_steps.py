"""Single training steps of a trainer, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from sdit.train.loop import Trainer
from sdit.train.record import StepRecord


def training_step(trainer: Trainer) -> Callable[[], StepRecord]:
    """Return a function that takes the next training step of the run, data included, and returns its record."""
    batches, state = iter(trainer.batches), trainer.context.state

    def step() -> StepRecord:
        micro_batches, span = next(batches), state.next_step()
        record = trainer.step.run(micro_batches, span)
        state.clock = span.clock
        return record

    return step
