"""Bounds on the predicted x0.

Without them, epsilon-prediction gives very noisy pixels with the cosine schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdit.diffusion.samplers.settings import SamplerSettings


def clip_x0(x0: Tensor, settings: SamplerSettings) -> Tensor:
    """Return `x0` (B, C, H, W) limited to +-clip_range in the way that `settings.clip_x0` selects."""
    if settings.clip_x0 == "none":
        return x0
    if settings.clip_x0 == "fixed":
        return x0.clamp(-settings.clip_range, settings.clip_range)
    return _clip_to_percentile(x0, settings.clip_range, settings.clip_percentile)


def _clip_to_percentile(x0: Tensor, bound: float, percentile: float) -> Tensor:
    """Clip each image at its percentile of |x0|, but not below `bound`, then scale it to `bound` (Imagen, sec. 2.3)."""
    magnitude = x0.abs().flatten(1)
    rank = max(1, math.ceil(percentile * magnitude.shape[1]))
    # quantile() is limited to 2^24 values
    cut = magnitude.kthvalue(rank, dim=1).values.clamp(min=bound)[:, None, None, None]
    return torch.minimum(torch.maximum(x0, -cut), cut) * (bound / cut)
