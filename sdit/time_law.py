"""The law of t in training: draws, quantiles, and the probability of each gate task. It needs no torch.

Every part that must know how often a task is drawn takes it from here: loads, placement, traffic, capacity, prior windows.
N samples of the global batch, T tasks. t is flow time: 0 is data, 1 is noise. Sources (arXiv): SD3 2403.03206, UW 2306.00354.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdit.config import Config, DiffusionConfig
from sdit.randomness import Purpose, uniform

Sampling = Literal["uniform", "stratified", "logit_normal", "stratified_logit_normal"]
Floats = NDArray[np.float64]

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@dataclass(frozen=True)
class TimeLaw:
    """The distribution of t. Fields with the name of a key of `diffusion` have its meaning.

    A stratified law has the same distribution as the plain one; only the samples of a global batch are spread evenly.
    `clusters` is K if whole timesteps are drawn from K clusters of equal weight (UW), else None.
    """

    timestep_sampling: Sampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    clusters: int | None = None

    @classmethod
    def of(cls, config: DiffusionConfig) -> TimeLaw:
        """Return the law that a run trains with."""
        if config.weighting == "uw":  # on the flow path, clusters of equal size are strata of t
            return cls("stratified", clusters=config.uw_clusters if config.path == "diffusion" else None)
        return cls(config.timestep_sampling, config.logit_mean, config.logit_std, config.time_shift)

    @property
    def is_logit_normal(self) -> bool:
        """Whether logit(t) is normal. Otherwise t is uniform before the shift."""
        return self.timestep_sampling.endswith("logit_normal")

    def draw(
        self, seed: int, first_index: int, global_batch: int, timesteps: int | None
    ) -> NDArray[np.int64] | NDArray[np.float32]:
        """Return t (N,) of the samples from `first_index` on: int64 in 0..T-1, or float32 in [0, 1) if `timesteps` is None.

        Each t is a function of `seed` and the sample index (stratified: and of the indices of the global batch). The float64
        values of logit_normal may differ in the last bit between CPUs. The rounded values practically never differ.
        """
        index = np.arange(first_index, first_index + global_batch)
        p = uniform(seed, index, Purpose.TIMESTEP)
        if self.timestep_sampling.startswith("stratified"):
            stratum = np.argsort(uniform(seed, index, Purpose.STRATUM))
            p = (stratum + p) / global_batch
        if timesteps is not None and self.clusters is not None:
            return _in_clusters(p, timesteps, self.clusters)
        t = self.quantile(p)
        if timesteps is None:
            return np.minimum(t.astype(np.float32), BELOW_ONE)
        return np.minimum((t * timesteps).astype(np.int64), timesteps - 1)

    def quantile(self, p: Floats) -> Floats:
        """Return t float64 of each probability p in (0, 1): the inverse of `cdf` (SD3, sec. 3.1 and "shifting")."""
        t = p
        if self.is_logit_normal:
            from scipy.special import expit, ndtri  # slow to import

            t = expit(self.logit_mean + self.logit_std * ndtri(p))
        return t if self.time_shift == 1 else self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def cdf(self, t: Floats) -> Floats:
        """Return the probability F(t), float64, of a time below each t in [0, 1]."""
        return self._tails(t, 1 - t)[0]

    def task_weights(self, timesteps: int) -> Floats:
        """Return T times the probability of each gate task floor(t T), float64 (T,), exactly 1 if the law is uniform."""
        if self.clusters is not None:
            size = np.diff(_cluster_edges(timesteps, self.clusters))
            return np.repeat(timesteps / (self.clusters * size), size)
        if not self.is_logit_normal and self.time_shift == 1:
            return np.ones(timesteps)
        edge = np.arange(timesteps + 1)
        below, above = self._tails(edge / timesteps, edge[::-1] / timesteps)
        # A difference of numbers near 1 would be a rounding error, so each task is measured in its nearer tail.
        return timesteps * np.where(below[:-1] < 0.5, np.diff(below), -np.diff(above))

    def _tails(self, t: Floats, rest: Floats) -> tuple[Floats, Floats]:
        """Return F(t) and 1 - F(t), each exact where it is small. `rest` is 1 - t."""
        shift = self.time_shift
        if self.is_logit_normal:
            from scipy.special import ndtr  # slow to import

            with np.errstate(divide="ignore"):  # both ends are infinite
                logit = np.log(t) - np.log(rest)
            z = (logit - self.logit_mean - math.log(shift)) / self.logit_std
            return ndtr(z), ndtr(-z)
        if shift == 1:
            return t, rest
        return t / (shift - (shift - 1) * t), shift * rest / (1 + (shift - 1) * rest)


def prior_law(config: Config) -> TimeLaw | None:
    """Return the law whose quantiles the windows of the prior follow. None: they follow t."""
    return TimeLaw.of(config.diffusion) if config.prior.axis == "quantile" else None


def _cluster_edges(timesteps: int, clusters: int) -> NDArray[np.int64]:
    """Return ceil(c T / K) of c = 0..K, int64: the first timestep of each cluster {t : floor(K t / T) = c}, and T."""
    return -(-np.arange(clusters + 1) * timesteps // clusters)


def _in_clusters(p: Floats, timesteps: int, clusters: int) -> NDArray[np.int64]:
    """Return timesteps (N,) of numbers p (N,) in (0, 1). Each cluster has weight 1 / K."""
    edges = _cluster_edges(timesteps, clusters)
    scaled = p * clusters
    cluster = np.minimum(scaled.astype(np.int64), clusters - 1)
    size = edges[cluster + 1] - edges[cluster]
    return edges[cluster] + np.minimum(((scaled - cluster) * size).astype(np.int64), size - 1)
