"""Measures mean and standard deviation of the latents of a prepared folder, per channel.

C channels, H = W size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sdit.data.index import DatasetFacts, ShardRecord
from sdit.data.latent_stats import LatentStatistics, latent_statistics
from sdit.data.shards import read_shard

MEASURED = 10_000  # latents, as in LightningDiT
_log = logging.getLogger(__name__)


def measure_latents(folder: Path, shards: Sequence[ShardRecord], facts: DatasetFacts) -> LatentStatistics | None:
    """Return the statistics of the latents that training draws, over at most MEASURED upright images and all positions.

    A draw is mean + exp(logvar / 2) eps, so its variance is the variance of the means plus the mean of exp(logvar). The
    variance of the means is the unbiased one. The shards are evenly spaced. Return None if a channel is constant.
    """
    count, mean, squares, spread = 0, np.zeros(facts.channels), np.zeros(facts.channels), np.zeros(facts.channels)
    for moments in _moments(folder, shards, facts):
        latents, log_variance = np.split(moments.astype(np.float64), 2)
        rows = latents.reshape(facts.channels, -1)
        added = rows.shape[1]
        difference = rows.mean(axis=1) - mean
        # Chan, Golub and LeVeque 1983: merge two sets of which mean and squared deviations are known.
        squares += ((rows - rows.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
        squares += difference**2 * (count * added / (count + added))
        mean += difference * (added / (count + added))
        spread += np.exp(log_variance).reshape(facts.channels, -1).sum(axis=1)
        count += added
    std = np.sqrt(squares / max(count - 1, 1) + spread / count)
    if not (np.isfinite(std).all() and (std.astype(np.float32) > 0).all()):
        _log.warning("a channel of the latents is constant or not finite, so the index holds no latent_stats")
        return None
    return latent_statistics(mean, std)


def _moments(folder: Path, shards: Sequence[ShardRecord], facts: DatasetFacts) -> Iterator[np.ndarray]:
    """Yield the moments (2C, H, W) of at most MEASURED samples of evenly spaced shards."""
    wanted = -(-MEASURED * len(shards) // facts.total)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(wanted, len(shards))).round().astype(int))
    count = 0
    for number in chosen.tolist():
        shard = read_shard(folder, shards[number], facts)
        for member in range(min(len(shard), MEASURED - count)):
            yield shard.sample(member).values[0]
            count += 1
