"""Pictures from a model: the same images for the same seed on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdit.config import Config, SampleConfig
from sdit.data.classes import Classes, choose_labels
from sdit.diffusion import SamplerSettings, sample
from sdit.distributed.comm import Comm
from sdit.distributed.engine import Engine
from sdit.model import DiffusionTransformer, forward_with_guidance
from sdit.randomness import Purpose, normal_noise
from sdit.train.decode import latent_decoder
from sdit.train.ema import Ema

SAMPLE_BATCH = 64  # images per rank and model call


def sample_images(
    model: DiffusionTransformer, config: Config, settings: SampleConfig, indices: np.ndarray, labels: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Images (n, C, H, W) float32, the i-th keyed by (settings.seed, indices[i]) with labels (n,); on the model's device."""
    device = model.pos_embed.device
    shape = (config.model.channels, config.model.input_size, config.model.input_size)
    noise = torch.from_numpy(normal_noise(settings.seed, indices, shape, Purpose.SAMPLE_START)).to(device)
    sampler = SamplerSettings.from_config(config.diffusion, settings, config.model.timesteps)
    guidance = settings.guidance if config.model.classes else 1.0

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        return forward_with_guidance(model, x, t, y, guidance, settings.guided_channels)

    return sample(predict, noise, torch.from_numpy(labels).to(device), sampler, settings.seed, indices, progress)


def grid_rows(config: Config, classes: Classes) -> list[int]:
    """The label of every row of the sample grid, of the trained `classes`; 0 for all rows of an unconditional model.

    Raises: ConfigError for a `sample.labels` that is none of them.
    """
    if config.sample.labels is not None:
        return choose_labels(config.sample.labels, classes, "sample.labels")
    return classes.labels[: config.sample.classes] if classes.count else [0] * config.sample.classes


def grid_labels(config: Config, classes: Classes) -> np.ndarray:
    """Labels (rows * columns,) int64 of the sample grid: one class per row."""
    return np.repeat(np.array(grid_rows(config, classes), dtype=np.int64), config.sample.images_per_class)


class GridSampler:
    """Draws the run's sample grid from the EMA, shared out over the ranks."""

    def __init__(self, config: Config, model: DiffusionTransformer, comm: Comm, labels: np.ndarray) -> None:
        self._config, self._model, self._comm, self._labels = config, model, comm, labels
        self._decode = latent_decoder(config, None, comm.device)

    def draw(self, engine: Engine, ema: Ema, step_done: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, C, H, W), decoded by sample.vae, and labels (n,) on every rank; what `step_done` raises ends it."""
        labels = self._labels
        training = self._model.training
        self._model.eval()
        try:
            with engine.weights_of(ema.values), torch.no_grad():
                return self._share(labels, step_done), labels
        finally:
            self._model.train(training)

    def gate_probs(self) -> np.ndarray:
        """(depth, T, M) gate probabilities of all tasks with the present weights, for the routing map; no communication."""
        return self._model.all_gate_probs().cpu().numpy()

    def _share(self, labels: np.ndarray, step_done: Callable[[], None]) -> np.ndarray:
        """Rank r draws images r, r + R, ...; all ranks make equally many model calls, as experts may be spread over them."""
        comm = self._comm
        per_rank = -(-len(labels) // comm.world)
        mine = np.minimum(np.arange(per_rank) * comm.world + comm.rank, len(labels) - 1)
        config = self._config
        parts = [
            sample_images(self._model, config, config.sample, chunk, labels[chunk], lambda _done, _steps: step_done())
            for chunk in np.array_split(mine, max(1, -(-per_rank // SAMPLE_BATCH)))
        ]
        if self._decode is not None:
            parts = [self._decode(part) for part in parts]
        return comm.interleave(torch.cat(parts))[: len(labels)].cpu().numpy()
