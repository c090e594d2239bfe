"""Compares the work of the ranks: percentiles from sums of a fixed size, and the rank with the most.

The work of a rank is counted in one of `BUCKETS` ranges, whose bounds grow by 2^(1/16). The sums over the ranks of counts and
seconds by range do not grow with the ranks. The ranks of one range count with their mean. A percentile therefore differs by
less than `RESOLUTION` of its value from that of the ranks' numbers, between `LEAST_SECONDS` and `MOST_SECONDS`. It is the same
if no two ranks share a range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_SECONDS, OCTAVES, PER_OCTAVE = 2.0**-14, 24, 16
MOST_SECONDS = LEAST_SECONDS * 2.0**OCTAVES
BUCKETS = OCTAVES * PER_OCTAVE
RESOLUTION = 2 ** (1 / PER_OCTAVE) - 1
RANK_BITS = 24  # of a packed number; 2^39 microseconds are 6 days


def work_share(seconds: float) -> Tensor:
    """Return one rank's part of the sums, float64 (2, BUCKETS): count and seconds of each range. All are 0 without work."""
    share = torch.zeros(2, BUCKETS, dtype=torch.float64)
    if seconds > 0:
        position = math.floor(math.log2(seconds / LEAST_SECONDS) * PER_OCTAVE)
        share[:, min(max(position, 0), BUCKETS - 1)] = torch.tensor([1.0, seconds], dtype=torch.float64)
    return share


def rank_report(sums: Tensor, mine: float, rank: int, smallest: Callable[[int], int]) -> dict[str, Any]:
    """Return the fields of `StepRecord` about slow ranks, from the sums (2, BUCKETS) of all ranks. All ranks call this.

    `mine` is the work of this rank in seconds. `smallest` returns the smallest integer of all ranks. Without work there are
    no fields.
    """
    counts = sums[0].round().long()
    if not counts.sum():
        return {}
    means = (sums[1] / sums[0].clamp(min=1)).repeat_interleave(counts)  # ascending, one per rank
    p50, p99 = torch.quantile(means, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    slowest = smallest((-round(mine * 1e6) << RANK_BITS) + rank) & ((1 << RANK_BITS) - 1)  # the first one of several
    return {"rank_step_seconds_p50": p50, "rank_step_seconds_p99": p99, "slowest_rank": slowest}
