"""The held-out loss: images the run never trains on, at fixed timesteps and noise, with the averaged weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sdit.clock import StepSpan
from sdit.config import ValidationConfig
from sdit.data.loader import Loader
from sdit.supervise.heartbeat import Phase
from sdit.time_law import TimeLaw
from sdit.train.batches import BatchDraws, micro_batches, rank_requests
from sdit.train.context import TrainContext, kept_times
from sdit.train.record import Validation
from sdit.train.sums import BINS, bin_means

SEED_OFFSET = 0x5EED_0FF5E7  # the held-out set shares no noise with training, for any two seeds
HELD_OUT = TimeLaw("stratified")  # under any law of training, so that held-out losses of runs can be compared


class Validator:
    """Measures the held-out loss; the same number on any layout, and at any time of the run for the same weights."""

    def __init__(self, context: TrainContext, config: ValidationConfig, loader: Loader | None) -> None:
        """`loader` None: the run has no held-out images, and validation is never due."""
        self._context, self._config, self._loader = context, config, loader
        self._seed = (config.seed + SEED_OFFSET) % 2**64
        global_batch = context.run.batch.global_batch
        self._images = -(-config.images // global_batch) * global_batch

    @property
    def is_on(self) -> bool:
        """Whether the run has held-out images."""
        return self._loader is not None

    def due(self, span: StepSpan) -> bool:
        """Return whether validation is due after a step: at its interval, and at the end."""
        return self._loader is not None and (span.crosses(self._config.every_images) or span.at_end)

    def measure(self) -> Validation:
        """Return the held-out loss. All ranks call it together.

        `validation_loss` is the noise loss (with the bound's term if the variance is learned), without the prior loss and
        the balance loss. Labels are never dropped. Experts keep what `experts.capacity_factor_eval` allows.
        Raises: StopAgreed.
        """
        context = self._context
        with (
            context.task(Phase.SAMPLE, "validation"),
            context.averaged_weights(),
            context.experts.evaluation() as begin_batch,
        ):
            sums, bins = self._sums(begin_batch)
        totals = context.comm.sum(torch.cat([sums, bins.flatten()]))
        loss, mse = (totals[:2] / self._images).tolist()
        return Validation(loss, mse, bin_means(totals[2:].view(2, BINS)), self._images)

    def _sums(self, begin_batch: Callable[[int, np.ndarray], None]) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 sums over this rank's images: (2,) of loss and mse, and the bins of mse."""
        context, plan = self._context, self._context.run.batch
        device = context.comm.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        bins = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        assert self._loader is not None
        draws = BatchDraws(self._seed, kept_times(self._times), context.model.config.classes, label_drop=0.0)
        steps = range(0, self._images, plan.global_batch)
        requests = rank_requests(plan, steps, context.comm.rank, context.comm.world)
        batches = micro_batches(self._loader, draws, device, requests)
        for first in steps:
            loaded = [next(batches) for _ in range(plan.accumulation)]
            begin_batch(first, loaded[0].times)
            for micro_step, each in enumerate(loaded):
                batch = context.experts.begin_micro_step(micro_step, each.on_device())
                losses = context.engine.module(batch, None, None)
                mse, vlb = losses.parts[1], losses.parts[2]
                sums += torch.stack([mse + vlb, mse])
                bins += losses.bins
            context.stop_point()
        return sums * plan.micro_batch, bins

    def _times(self, first: int) -> np.ndarray:
        """One t in each equal part of the time axis for every global batch: less noise than independent ones."""
        global_batch, timesteps = self._context.run.batch.global_batch, self._context.objective.timesteps
        return HELD_OUT.draw(self._seed, first, global_batch, timesteps)
