"""The micro-batches of this rank, step by step. The loader's threads draw all that depends on (seed, sample index) only.

N samples of the global batch, B samples of a micro-batch of this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from sdit.contracts import Batch
from sdit.data.loader import Loader
from sdit.data.order import rank_indices
from sdit.diffusion import draw_label_drop
from sdit.distributed.comm import Comm
from sdit.randomness import Purpose, normal_noise
from sdit.supervise.heartbeat import Phase
from sdit.topology import BatchPlan
from sdit.train.context import TimesOf, TrainContext
from sdit.transfers import PendingUpload, upload_stream


class Request(NamedTuple):
    """The run indices (B,) of a micro-batch, in the step whose first sample is `first_sample`."""

    first_sample: int
    indices: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch whose copy to the device has begun. `times` (N,) are those of all samples of its step."""

    index: np.ndarray
    times: np.ndarray
    upload: PendingUpload

    def on_device(self) -> Batch:
        """Return the batch. The device waits for the copy, the host does not."""
        x0, noise, t, y = self.upload.wait()
        return Batch(index=torch.from_numpy(self.index), x0=x0, noise=noise, t=t, y=y)


@dataclass(frozen=True)
class BatchDraws:
    """What is drawn for samples. It depends on `seed` and the sample index, and on nothing else.

    `times` returns the times (N,) of the step that begins at a sample. `label_drop` is the probability that a label becomes
    the null label, which is `classes`.
    """

    seed: int
    times: TimesOf
    classes: int
    label_drop: float

    def labels(self, y: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the labels (B,) after label drop."""
        if not (self.classes and self.label_drop):
            return y
        return np.where(draw_label_drop(self.seed, index, self.label_drop), self.classes, y)


def micro_batches(
    loader: Loader, draws: BatchDraws, device: torch.device, requests: Iterator[Request]
) -> Iterator[MicroBatch]:
    """Yield the micro-batch of each request. The loader's threads read it, draw for it and begin its copy to the device."""
    stream = upload_stream(device)

    def make(request: Request) -> MicroBatch:
        loaded, times = loader.read(request.indices), draws.times(request.first_sample)
        noise = normal_noise(draws.seed, loaded.index, loaded.x0.shape[1:], Purpose.NOISE)
        own_times, labels = times[loaded.index - request.first_sample], draws.labels(loaded.y, loaded.index)
        return MicroBatch(loaded.index, times, stream.begin((loaded.x0, noise, own_times, labels)))

    return loader.prefetch(requests, make)


class BatchStream:
    """Iterates over the steps of a run; `rewind` continues from a clock that a roll-back has changed."""

    def __init__(self, context: TrainContext) -> None:
        self._context = context
        self._first_step = context.state.clock.steps
        self._loaded: Iterator[MicroBatch] | None = None
        config = context.run.config
        self._draws = BatchDraws(config.seed, context.times_of, config.model.classes, config.diffusion.label_drop)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each step until the clock is at the end."""
        context, state = self._context, self._context.state
        while state.clock.images_seen < state.length_images:
            phase = Phase.FIRST_STEP if state.clock.steps == self._first_step else Phase.STEP
            context.heartbeat.enter(phase, state.clock.steps)
            context.timer.begin_step()
            if self._loaded is None:
                self._loaded = micro_batches(context.loader, self._draws, context.comm.device, self._requests())
            with context.timer.host_work(), context.timer.phase("data_wait"):
                loaded = [next(self._loaded) for _ in range(context.run.batch.accumulation)]
            yield loaded

    def rewind(self) -> None:
        """Load from the present clock again."""
        self._loaded = None

    def _requests(self) -> Iterator[Request]:
        """Return the requests of this rank's micro-batches from the present clock to the end of the run."""
        state, plan, comm = self._context.state, self._context.run.batch, self._context.comm
        clock = state.clock
        steps = range(clock.images_seen, state.length_images, plan.global_batch)
        return rank_requests(plan, map(clock.sample_at, steps), comm.rank, comm.world)


def with_other_targets(batches: Sequence[Batch], first_sample: int, comm: Comm) -> list[Batch]:
    """Return this rank's micro-batches of a step, each with the flow targets of the samples before its own.

    The sample before the first of the global batch is the last one. `batches` are all micro-batches of the step that begins
    at `first_sample`, in order. Rank r loads the samples whose run index is r modulo the number of ranks, so the sample before
    each of its own was loaded by rank r - 1, in the same step. All ranks call this together: one transfer to the next rank.
    """
    targets = torch.cat([batch.noise - batch.x0 for batch in batches])
    others = comm.from_rank_before(targets)
    if first_sample % comm.world == comm.rank:  # the rank before loads its first sample after this rank's first
        others = others.roll(1, 0)
    parts = others.split([len(batch.x0) for batch in batches])
    return [replace(batch, other_target=part) for batch, part in zip(batches, parts, strict=True)]


def rank_requests(plan: BatchPlan, first_samples: Iterable[int], rank: int, world: int) -> Iterator[Request]:
    """Yield the request of each micro-step of a rank, for each step that begins at one of `first_samples`."""
    for first in first_samples:
        for micro_step in range(plan.accumulation):
            indices = rank_indices(first, plan.global_batch, rank, world, micro_step, plan.accumulation)
            yield Request(first, indices)
