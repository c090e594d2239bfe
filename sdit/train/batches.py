"""The micro-batches of this rank, step by step. Noise, times and label drop depend on seed and sample index only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sdit.contracts import Batch, RawBatch
from sdit.data.order import rank_indices
from sdit.diffusion import draw_label_drop
from sdit.randomness import Purpose, normal_noise
from sdit.supervise.heartbeat import Phase
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
            context.heartbeat.enter(phase, state.clock.steps)
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


def draw_batch(
    samples: RawBatch, times: np.ndarray, seed: int, classes: int, label_drop: float, device: torch.device
) -> Batch:
    """Return the batch of `samples` (B) on the device, with their times (B,).

    `label_drop` is the probability that a label becomes the null label, which is `classes`.
    """
    labels = samples.y
    if classes and label_drop:
        labels = np.where(draw_label_drop(seed, samples.index, label_drop), classes, labels)
    noise = normal_noise(seed, samples.index, samples.x0.shape[1:], Purpose.NOISE)
    return Batch(
        index=torch.from_numpy(samples.index),
        x0=torch.from_numpy(samples.x0).to(device, non_blocking=True),
        noise=torch.from_numpy(noise).to(device, non_blocking=True),
        t=torch.from_numpy(times).to(device, non_blocking=True),
        y=torch.from_numpy(labels).to(device, non_blocking=True),
    )
