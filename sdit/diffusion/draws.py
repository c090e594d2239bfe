"""Label drop and the noise of sampling steps as functions of (seed, sample index), independent of ranks and batches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdit.randomness import Indices, Purpose, normal_noise, uniform
from sdit.transfers import upload


def draw_label_drop(seed: int, indices: Indices, probability: float) -> NDArray[np.bool_]:
    """Return bool (B,), True if training hides the label of the sample."""
    return uniform(seed, indices, Purpose.LABEL_DROP) < probability


def draw_step_noise(seed: int, indices: Indices, step: int, x: Tensor) -> Tensor:
    """Return the float32 normal noise of a sampler's step, on the device of `x` (B, C, H, W). Steps count down to 0."""
    noise = normal_noise(seed, indices, tuple(x.shape[1:]), Purpose.SAMPLE_STEP, step)
    return upload(torch.from_numpy(noise), x.device)
