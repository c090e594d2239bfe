"""Images from a trained model on any number of ranks: the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.contracts import Precision, Progress
from sdit.distributed.comm import Comm
from sdit.errors import ConfigError
from sdit.model.precision import tf32_products
from sdit.train.decode import LatentDecoder
from sdit.train.sampling import sample_images

TF32_CAPABILITY = (8, 0)  # of a GPU


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse TF32 on a device that computes none. Results in float32 would be named tf32. Raises: ConfigError."""
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < TF32_CAPABILITY):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
        raise ConfigError(f"--precision: tf32, but {name} computes no TF32; legal: fp32, bf16")


def with_precision(trained: Trained, precision: Precision) -> Trained:
    """Return a trained model whose products have a precision. The model is changed in place.

    bf16 rounds the parameters, as a training run in bf16 does: its sample grids have the same arithmetic. Time embedding,
    gates and sampler stay float32. tf32 leaves the parameters as they are.
    """
    if precision == "bf16":
        for parameter in trained.model.parameters():
            parameter.data = parameter.data.bfloat16()
    return replace(trained, precision=precision)


@dataclass(frozen=True)
class Generator:
    """A trained model that samples images on all ranks of `comm` (None: in one process), `batch` of them per model call.

    The model is whole on every rank, and `decoder` turns its latents into pixels there. Guidance doubles the batch. Unless the
    precision is fp32, the products that stay float32 (such as those of the decoder) are TF32 on a GPU.
    """

    trained: Trained
    settings: SampleConfig
    decoder: LatentDecoder | None = None
    comm: Comm | None = None
    batch: int = 64

    @torch.no_grad()
    def images(self, labels: np.ndarray, first: int = 0, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Yield all images in order, chunk by chunk: (n, C, H, W) float32 on every rank. Image first + i has labels[i].

        Rank r of R samples images r, r + R, ... `progress` is called with (sampler steps done, all sampler steps) of this rank.
        """
        rank, world = (self.comm.rank, self.comm.world) if self.comm is not None else (0, 1)
        batch = min(self.batch, -(-len(labels) // world))
        starts = range(0, len(labels), batch * world)
        for round_number, start in enumerate(starts):
            # Every rank needs equally many rows for the gather: past the end, the last image is sampled again and dropped.
            mine = np.minimum(start + np.arange(batch) * world + rank, len(labels) - 1)

            def step_done(done: int, steps: int, before: int = round_number) -> None:
                if progress is not None:
                    progress(before * steps + done, len(starts) * steps)

            diffusion = self.trained.config.diffusion
            with tf32_products(self.trained.precision != "fp32"):
                images = sample_images(
                    self.trained.model, diffusion, self.settings, first + mine, labels[mine], step_done
                )
                if self.decoder is not None:
                    images = self.decoder(images)
            if self.comm is not None:
                images = self.comm.interleave(images)
            yield images[: len(labels) - start].cpu().numpy()
