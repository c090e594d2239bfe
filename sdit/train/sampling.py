"""Pictures from a model: the same images for the same seed on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdit.config import Config, SampleConfig
from sdit.diffusion import SamplerSettings, Stream, draw_noise, sample
from sdit.model import DiffusionTransformer, forward_with_guidance
from sdit.parallel.comm import Comm
from sdit.parallel.engine import Engine
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
    noise = torch.from_numpy(draw_noise(settings.seed, indices, shape, stream=Stream.SAMPLE_START)).to(device)
    sampler = SamplerSettings.from_config(config.diffusion, settings, config.model.timesteps)
    guidance = settings.guidance if config.model.classes else 1.0

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        return forward_with_guidance(model, x, t, y, guidance, settings.guided_channels)

    return sample(predict, noise, torch.from_numpy(labels).to(device), sampler, settings.seed, indices, progress)


def grid_labels(config: Config) -> np.ndarray:
    """Labels (rows * columns,) of the sample grid: one class per row."""
    rows = min(config.sample.classes, config.model.classes) if config.model.classes else config.sample.classes
    labels = np.repeat(np.arange(rows, dtype=np.int64), config.sample.images_per_class)
    return labels if config.model.classes else np.zeros_like(labels)


class GridSampler:
    """Draws the run's sample grid from the EMA, shared out over the ranks."""

    def __init__(self, config: Config, model: DiffusionTransformer, comm: Comm) -> None:
        self._config, self._model, self._comm = config, model, comm
        self._decode = latent_decoder(config, None, comm.device)

    def draw(self, engine: Engine, ema: Ema, step_done: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, C, H, W), decoded by sample.vae, and labels (n,) on every rank; what `step_done` raises ends it."""
        labels = grid_labels(self._config)
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
