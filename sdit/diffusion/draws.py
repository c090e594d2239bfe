"""Timesteps and label drop as functions of (seed, sample index), independent of the number of ranks and the batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdit.randomness import Indices, Purpose, uniform

TimestepMode = Literal["uniform", "stratified", "uw"]

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def draw_timesteps(
    seed: int,
    first_index: int,
    global_batch: int,
    timesteps: int | None,
    mode: TimestepMode = "uniform",
    clusters: int = 8,
) -> NDArray[np.int64] | NDArray[np.float32]:
    """Return t (global_batch,) of the samples from `first_index` on: int64 in 0..T-1, or float32 in (0, 1) if T is None.

    `stratified`: the range 0..T-1 is cut into global_batch equal strata, and each stratum gives one t, in random order.
    Each single t is still uniform.
    `uw`: strata over `clusters` clusters of equal weight, so that each cluster gets the same number of samples.
    """
    index = np.arange(first_index, first_index + global_batch)
    position = uniform(seed, index, Purpose.TIMESTEP)
    if mode != "uniform":
        stratum = np.argsort(uniform(seed, index, Purpose.STRATUM))
        position = (stratum + position) / global_batch
    if timesteps is None:
        return np.minimum(position.astype(np.float32), BELOW_ONE)  # equal clusters of [0, 1] need no conversion
    if mode == "uw":
        return _in_clusters(position, timesteps, clusters)
    return np.minimum((position * timesteps).astype(np.int64), timesteps - 1)


def draw_label_drop(seed: int, indices: Indices, probability: float) -> NDArray[np.bool_]:
    """Return bool (B,), True if training hides the label of the sample."""
    return uniform(seed, indices, Purpose.LABEL_DROP) < probability


def _in_clusters(position: NDArray[np.float64], timesteps: int, clusters: int) -> NDArray[np.int64]:
    """Return timesteps (B,) of positions in (0, 1). Each cluster {t : floor(K t / T) = c} has weight 1 / K."""
    edges = -(-np.arange(clusters + 1) * timesteps // clusters)  # ceil(c T / K), the first t of cluster c
    scaled = position * clusters
    cluster = np.minimum(scaled.astype(np.int64), clusters - 1)
    size = edges[cluster + 1] - edges[cluster]
    return edges[cluster] + np.minimum(((scaled - cluster) * size).astype(np.int64), size - 1)
