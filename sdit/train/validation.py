"""The held-out loss: images the run never trains on, at fixed timesteps and noise, with the averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sdit.config import Config, DataConfig
from sdit.data.dataset import check_fit, open_dataset
from sdit.data.identity import DataIdentity
from sdit.data.loader import Loader
from sdit.data.order import rank_indices
from sdit.diffusion import Objective, draw_timesteps
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.model import DiffusionTransformer
from sdit.topology import BatchPlan
from sdit.train.batch import draw_batch
from sdit.train.bins import BINS, bin_means
from sdit.train.ema import Ema
from sdit.train.rundata import Note, check_held_out, was_accepted

SEED_OFFSET = 0x5EED_0FF5E7  # the held-out set shares no noise with training, whatever the two seeds


def open_held_out(
    config: Config, training: DataIdentity, ranks: int, manifest: Mapping[str, Any] | None, where: str
) -> tuple[Loader | None, list[Note]]:
    """The loader of the held-out images, and what there is to say of them; None where the config asks for none.

    Raises: DataError if they do not fit the model or the training images; see `check_held_out`.
    """
    validation = config.validation
    if validation.every_images is None or validation.path is None:
        return None, []
    data = DataConfig(
        source="shards", path=validation.path, workers=config.data.workers, latent_scale=config.data.latent_scale
    )
    dataset = open_dataset(data)
    identity = DataIdentity.of(dataset.facts, dataset.fingerprint)
    notes = check_held_out(config, training, identity, was_accepted(manifest, where, training, identity))
    check_fit(dataset.facts, data, config.model, "validation.path")
    return Loader(dataset, data, validation.seed, ranks, labelled=config.model.classes > 0), notes


class Validator:
    """Measures the held-out loss; the same number on any layout, and at any time of the run for the same weights."""

    def __init__(
        self, config: Config, batch: BatchPlan, comm: Comm, objective: Objective, model: DiffusionTransformer,
        experts: ExpertParallel, loader: Loader,
    ) -> None:  # fmt: skip
        self._config, self._batch, self._comm, self._objective = config, batch, comm, objective
        self._model, self._experts, self._loader = model, experts, loader
        self._seed = (config.validation.seed + SEED_OFFSET) % 2**64
        self.images = -(-config.validation.images // batch.global_batch) * batch.global_batch

    def measure(self, engine: Engine, ema: Ema, batch_done: Callable[[], None]) -> dict[str, Any]:
        """The validation keys of metrics.jsonl. All ranks call it together; what `batch_done` raises ends it.

        `validation_loss` is the noise loss (with the bound's term where the variance is learned), unlike `loss` without
        the prior's and the balance's; labels are never dropped; experts keep what `experts.capacity_factor_eval` allows.
        """
        training = self._model.training
        self._model.eval()
        try:
            with engine.weights_of(ema.values), torch.no_grad(), self._experts.evaluation() as begin_batch:
                sums, bins = self._sums(engine, begin_batch, batch_done)
        finally:
            self._model.train(training)
        totals = self._comm.sum(torch.cat([sums, bins.flatten()]))
        loss, mse = (totals[:2] / self.images).tolist()
        by_bin = bin_means(totals[2:].view(2, BINS))
        keys = {"validation_loss": loss, "validation_mse": mse, "validation_loss_by_timestep": by_bin}
        return keys | {"validation_images": self.images}

    def _sums(
        self, engine: Engine, begin_batch: Callable[[int, np.ndarray], None], batch_done: Callable[[], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 sums over this rank's images: (2,) of loss and mse, and the bins of mse."""
        device = self._comm.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        bins = torch.zeros(2, BINS, dtype=torch.float64, device=device)
        batches = self._loader.batches(self._requests())
        for first in range(0, self.images, self._batch.global_batch):
            times = self._times(first)
            begin_batch(first, times)
            for micro_step in range(self._batch.accumulation):
                samples = self._experts.begin_micro_step(micro_step, next(batches))
                batch = draw_batch(self._config, self._seed, samples, times[samples.index - first], 0.0, device)
                losses = engine.module(batch, None, None)
                mse, vlb = losses.parts[1], losses.parts[2]
                sums += torch.stack([mse + vlb, mse])
                bins += losses.bins
            batch_done()
        return sums * self._batch.micro_batch, bins

    def _times(self, first: int) -> np.ndarray:
        """One t in each equal part of the time axis for every global batch: less noise than independent ones."""
        return draw_timesteps(self._seed, first, self._batch.global_batch, self._objective.timesteps, mode="stratified")

    def _requests(self) -> Iterator[np.ndarray]:
        plan, comm = self._batch, self._comm
        for first in range(0, self.images, plan.global_batch):
            for micro_step in range(plan.accumulation):
                yield rank_indices(first, plan.global_batch, comm.rank, comm.world, micro_step, plan.accumulation)
