"""Images from a trained model on any number of ranks: the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.distributed.comm import Comm
from sdit.train.decode import LatentDecoder
from sdit.train.sampling import sample_images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generator:
    """A trained model that samples images on all ranks of `comm` (None: in one process), `batch` of them per model call.

    The model is whole on every rank, and `decoder` turns its latents into pixels there. Guidance doubles the batch.
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
            images = sample_images(self.trained.model, diffusion, self.settings, first + mine, labels[mine], step_done)
            if self.decoder is not None:
                images = self.decoder(images)
            if self.comm is not None:
                images = self.comm.interleave(images)
            yield images[: len(labels) - start].cpu().numpy()
