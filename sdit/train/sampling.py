"""Images from a model: the same images for the same seed on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdit.clock import StepSpan
from sdit.config import DiffusionConfig, SampleConfig
from sdit.data.classes import Classes, choose_labels
from sdit.diffusion import SamplerSettings, sample
from sdit.model import DiffusionTransformer, forward_with_guidance
from sdit.randomness import Purpose, normal_noise
from sdit.supervise.heartbeat import Phase
from sdit.train.decode import LatentDecoder

if TYPE_CHECKING:  # `sdit sample` and `sdit evaluate` need no trainer
    from sdit.train.context import TrainContext

SAMPLE_BATCH = 64  # images per rank and model call


def sample_images(
    model: DiffusionTransformer, diffusion: DiffusionConfig, settings: SampleConfig, indices: np.ndarray,
    labels: np.ndarray, progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Return images (n, C, H, W) float32 on the model's device. Image i is keyed by (settings.seed, indices[i]) and labels[i]."""
    device, config = model.device, model.config
    shape = (config.channels, config.input_size, config.input_size)
    noise = torch.from_numpy(normal_noise(settings.seed, indices, shape, Purpose.SAMPLE_START)).to(device)
    sampler = SamplerSettings.from_config(diffusion, settings, config.timesteps)
    guidance = settings.guidance if config.classes else 1.0

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        scale = guidance if sampler.guides_at(t) else 1.0
        return forward_with_guidance(model, x, t, y, scale, settings.guided_channels)

    return sample(predict, noise, torch.from_numpy(labels).to(device), sampler, settings.seed, indices, progress)


def grid_rows(settings: SampleConfig, classes: Classes) -> list[int]:
    """Return the label of every row of the sample grid, of the trained `classes`; 0 for all rows of an unconditional model.

    Raises: ConfigError for a `sample.labels` that is none of them.
    """
    if settings.labels is not None:
        return choose_labels(settings.labels, classes, "sample.labels")
    return classes.labels[: settings.classes] if classes.count else [0] * settings.classes


def grid_labels(settings: SampleConfig, classes: Classes) -> np.ndarray:
    """Return labels (rows * columns,) int64 of the sample grid: one class per row."""
    return np.repeat(np.array(grid_rows(settings, classes), dtype=np.int64), settings.images_per_class)


class GridSampler:
    """Draws the run's sample grid from the EMA; the ranks share the images."""

    def __init__(
        self, context: TrainContext, settings: SampleConfig, labels: np.ndarray, decode: LatentDecoder | None
    ) -> None:
        self._context, self._settings, self._labels, self._decode = context, settings, labels, decode

    def due(self, span: StepSpan) -> bool:
        """Return whether the grid is due after a step: at its interval, and at the end."""
        return span.crosses(self._settings.every_images) or span.at_end

    def draw(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return images (n, C, H, W), decoded by sample.vae, labels (n,) and the columns of the grid.

        Only rank 0 gets the images. The others get none. Raises: StopAgreed.
        """
        context = self._context
        with context.task(Phase.SAMPLE, "sample"), context.averaged_weights():
            return self._share(), self._labels, self._settings.images_per_class

    def _share(self) -> np.ndarray:
        """Rank r draws images r, r + R, ... All ranks make equally many model calls, because experts may be sharded."""
        context, labels = self._context, self._labels
        comm, diffusion = context.comm, context.run.config.diffusion
        per_rank = -(-len(labels) // comm.world)
        mine = np.minimum(np.arange(per_rank) * comm.world + comm.rank, len(labels) - 1)
        images = [
            sample_images(
                context.model, diffusion, self._settings, chunk, labels[chunk], lambda *_: context.stop_point()
            )
            for chunk in np.array_split(mine, max(1, -(-per_rank // SAMPLE_BATCH)))
        ]
        if self._decode is not None:
            images = [self._decode(chunk) for chunk in images]
        return comm.interleave_on_first(torch.cat(images), len(labels)).cpu().numpy()


class RoutingMaps:
    """When a routing map is due, and the gate probabilities of all tasks, from the present weights.

    The map of token-routed experts is counted by the step itself (`TrainStep.run`).
    """

    def __init__(self, context: TrainContext, sampler: GridSampler, every_images: int | None) -> None:
        self._context, self._sampler, self._every_images = context, sampler, every_images

    def due(self, span: StepSpan) -> bool:
        """Return whether a map of the gates is due after a step: at its interval or with the sample grid, and at the end."""
        return self._context.model.config.variant == "switch" and self._is_time(span)

    def tokens_due(self, span: StepSpan) -> bool:
        """Return whether a step counts the map of token-routed experts. It does so when maps of gates are due."""
        return self._context.model.config.moe is not None and self._is_time(span)

    def _is_time(self, span: StepSpan) -> bool:
        own = self._every_images
        return span.at_end or (self._sampler.due(span) if own is None else span.crosses(own))

    def measure(self) -> tuple[np.ndarray, list[int] | None]:
        """Return probabilities (depth, T, M) and the columns of the prior's mask; no communication."""
        return self._context.model.all_gate_probs().cpu().numpy(), self._context.state.prior.columns
