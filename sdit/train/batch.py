"""From loaded samples to a batch: noise, times and label drop are functions of (seed, sample index) alone."""

from __future__ import annotations

import numpy as np
import torch

from sdit.contracts import Batch, RawBatch
from sdit.diffusion import draw_label_drop
from sdit.randomness import Purpose, normal_noise


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
