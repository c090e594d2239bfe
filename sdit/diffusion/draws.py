"""Random numbers as pure functions of (seed, sample index): the same on any number of ranks and in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

TimestepMode = Literal["uniform", "stratified", "uw"]
Indices = Sequence[int] | NDArray[np.int64]

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    TIMESTEP = 0
    STRATUM = 1
    LABEL_DROP = 2
    NOISE = 3
    SAMPLE_START = 4
    SAMPLE_STEP = 5


def draw_uniform(seed: int, indices: Indices, stream: int) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), float64 (B,), keyed by `seed` (< 2^64), each index and `stream` (< 2^32)."""
    index = np.asarray(indices).astype(np.uint64)
    zero = np.zeros_like(index)
    words = _philox((index & _LOW, index >> _HALF, zero + np.uint64(stream), zero), seed)
    bits = ((words[0] << _HALF) | words[1]) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def draw_timesteps(
    seed: int,
    first_index: int,
    global_batch: int,
    timesteps: int | None,
    mode: TimestepMode = "uniform",
    clusters: int = 8,
) -> NDArray[np.int64] | NDArray[np.float32]:
    """The t (global_batch,) of the samples from `first_index` on: int64 in 0..T-1, or float32 in (0, 1) if T is None.

    `stratified`: one t in each equal part of 0..T-1, the parts in random order; a sample alone is still uniform.
    `uw`: the same over `clusters` clusters of equal weight, so that each cluster has the same number of samples.
    """
    index = np.arange(first_index, first_index + global_batch)
    position = draw_uniform(seed, index, Stream.TIMESTEP)
    if mode != "uniform":
        stratum = np.argsort(draw_uniform(seed, index, Stream.STRATUM))
        position = (stratum + position) / global_batch
    if timesteps is None:
        return np.minimum(position.astype(np.float32), BELOW_ONE)  # equal clusters of [0, 1] need no map
    if mode == "uw":
        return _in_clusters(position, timesteps, clusters)
    return np.minimum((position * timesteps).astype(np.int64), timesteps - 1)


def draw_label_drop(seed: int, indices: Indices, probability: float) -> NDArray[np.bool_]:
    """Whether training hides each sample's label, bool (B,)."""
    return draw_uniform(seed, indices, Stream.LABEL_DROP) < probability


def draw_noise(
    seed: int, indices: Indices, shape: tuple[int, ...], *, stream: int = Stream.NOISE, step: int = 0
) -> NDArray[np.float32]:
    """Standard normal noise, float32 (B, *shape), keyed by `seed`, each index, `stream` and `step`."""
    noise = np.empty((len(indices), *shape), np.float32)
    key = np.array([seed, stream], np.uint64)
    for row, index in zip(noise, indices, strict=True):
        # A generator of its own for each sample costs 9 us; the counter's low word runs within the sample.
        counter = np.array([0, step, index, 0], np.uint64)
        np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(dtype=np.float32, out=row)
    return noise


def _in_clusters(position: NDArray[np.float64], timesteps: int, clusters: int) -> NDArray[np.int64]:
    """Timesteps (B,) from positions in (0, 1), where every cluster {t : floor(K t / T) = c} has weight 1 / K."""
    edges = -(-np.arange(clusters + 1) * timesteps // clusters)  # ceil(c T / K), the first t of cluster c
    scaled = position * clusters
    cluster = np.minimum(scaled.astype(np.int64), clusters - 1)
    size = edges[cluster + 1] - edges[cluster]
    return edges[cluster] + np.minimum(((scaled - cluster) * size).astype(np.int64), size - 1)


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]


def _philox(counter: Words, key: int) -> Words:
    """Philox4x32-10 of four 32-bit counter words (B,) under a 64-bit key, vectorised (Salmon et al. 2011).

    Written out because NumPy's generators take one key at a time, and only raw bits stay the same over its versions.
    """
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0 = np.uint64(((key & 0xFFFFFFFF) + turn * _KEY_STEPS[0]) & 0xFFFFFFFF)
        k1 = np.uint64(((key >> 32) + turn * _KEY_STEPS[1]) & 0xFFFFFFFF)
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (odd >> _HALF) ^ c1 ^ k0, odd & _LOW, (even >> _HALF) ^ c3 ^ k1, even & _LOW
    return c0, c1, c2, c3
