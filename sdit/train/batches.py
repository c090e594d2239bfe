"""The micro-batches of this rank, step by step, from the clock to the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sdit.contracts import RawBatch
from sdit.data.order import rank_indices
from sdit.supervise.pulse import Phase
from sdit.topology import BatchPlan
from sdit.train.context import TrainContext


class BatchStream:
    """Iterates over the steps of a run; `rewind` continues from a clock that a roll-back has changed."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._first_step = context.state.clock.steps
        self._loaded: Iterator[RawBatch] | None = None

    def __iter__(self) -> Iterator[list[RawBatch]]:
        """Yield this rank's micro-batches of each step until the clock is at the end."""
        context, state = self._context, self._context.state
        while state.clock.images_seen < state.length_images:
            phase = Phase.FIRST_STEP if state.clock.steps == self._first_step else Phase.STEP
            context.pulse.mark(phase, state.clock.steps)
            context.timer.begin_step()
            if self._loaded is None:
                self._loaded = context.loader.batches(self._requests())
            with context.timer.host_work(), context.timer.phase("data_wait"):
                micro_batches = [next(self._loaded) for _ in range(context.run.batch.accumulation)]
            yield micro_batches

    def rewind(self) -> None:
        """Load from the present clock again."""
        self._loaded = None

    def _requests(self) -> Iterator[np.ndarray]:
        """Sample indices of this rank's micro-batches from the present clock to the end of the run."""
        state, plan, comm = self._context.state, self._context.run.batch, self._context.comm
        clock = state.clock
        for images_seen in range(clock.images_seen, state.length_images, plan.global_batch):
            yield from rank_requests(plan, clock.sample_at(images_seen), comm.rank, comm.world)


def rank_requests(plan: BatchPlan, first_sample: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """Yield the sample indices (micro_batch,) of each micro-step of a rank, for the step that begins at `first_sample`."""
    for micro_step in range(plan.accumulation):
        yield rank_indices(first_sample, plan.global_batch, rank, world, micro_step, plan.accumulation)
