"""Images from a trained model on any number of ranks: the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.distributed.comm import Comm
from sdit.train.sampling import sample_images

Progress = Callable[[int, int], None]


@torch.no_grad()
def generate(
    trained: Trained,
    settings: SampleConfig,
    labels: np.ndarray,
    comm: Comm | None = None,
    batch: int = 64,
    progress: Progress | None = None,
    first: int = 0,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[np.ndarray]:
    """All images in order, chunk by chunk: (n, C, H, W) float32 on every rank; image first + i bears labels[i].

    Rank r of R draws images r, r + R, ..., `batch` of them in a model call (doubled by guidance); without `comm` R = 1.
    The model is whole on every rank, and `decode` turns its latents into pixels there. `progress` is called with (sampler
    steps done, all sampler steps) of this rank.
    """
    rank, world = (comm.rank, comm.world) if comm is not None else (0, 1)
    batch = min(batch, -(-len(labels) // world))
    starts = range(0, len(labels), batch * world)
    for round_number, start in enumerate(starts):
        # Every rank needs equally many rows for the gather: past the end, the last image is drawn again and dropped.
        mine = np.minimum(start + np.arange(batch) * world + rank, len(labels) - 1)

        def step_done(done: int, steps: int, before: int = round_number) -> None:
            if progress is not None:
                progress(before * steps + done, len(starts) * steps)

        images = sample_images(trained.model, trained.config.diffusion, settings, first + mine, labels[mine], step_done)
        if decode is not None:
            images = decode(images)
        if comm is not None:
            images = comm.interleave(images)
        yield images[: len(labels) - start].cpu().numpy()
