"""Losses by timestep: sums and counts over equal parts of the time axis."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20


def bin_by_timestep(values: Tensor, t: Tensor, timesteps: int) -> Tensor:
    """(2, BINS) float64: sum and count of `values` (B,) in each equal part of 0..T-1, or of [0, 1) for continuous t (B,)."""
    position = t.double() if t.is_floating_point() else t.double() / timesteps
    index = (position * BINS).long().clamp_(0, BINS - 1)
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    sums[0].index_add_(0, index, values.detach().double())
    sums[1].index_add_(0, index, torch.ones_like(position))
    return sums


def bin_means(sums: Tensor) -> list[float | None]:
    """Mean of each bin of `sums` (2, BINS); None where no sample fell."""
    totals, counts = sums.tolist()
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
