"""Statistics of features, gathered batch by batch in bounded memory. n features of D numbers, K classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sdit.errors import DataError
from sdit.evaluate.features import Batches, FeatureNetwork, rebatched

KEPT_FEATURES = 10_000  # of a set, for KID, precision and recall, which compare features one by one
KEPT_LOGITS = 50_000  # of a set, for the Inception score
BATCH = 500  # images per network call and per update of the moments

Seen = Callable[[int], None]  # called with the number of images done


@dataclass(frozen=True)
class FeatureStatistics:
    """What scores are computed from.

    `count` images, or None where a foreign file does not say; `mean` (D,) and unbiased `covariance` (D, D) float64 of all
    features; `features` (n, D) float32 and `logits` (n, K) float32 of an even random choice of the images, or None where a
    file does not hold them; `images` sha256 of all pixels and of the shape of one image, or None where it is not known.
    """

    count: int | None
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None
    logits: np.ndarray | None
    images: str | None


def statistics_of(images: Batches, network: FeatureNetwork, seen: Seen | None = None) -> FeatureStatistics:
    """Statistics of a stream of images (n, H, W, C) uint8.

    Raises:
        ConfigError: the network does not take such images.
        DataError: fewer than two images.
    """
    moments, content = Moments(), hashlib.sha256()
    features, logits = Reservoir(KEPT_FEATURES), Reservoir(KEPT_LOGITS)
    for batch in rebatched(images, BATCH):
        if not moments.count:
            height, width, channels = batch.shape[1:]
            network.check((height, width, channels))
            content.update(f"{height} {width} {channels}\n".encode())
        content.update(np.ascontiguousarray(batch).data)
        new_features, new_logits = network(batch)
        moments.add(new_features)
        features.add(new_features)
        logits.add(new_logits)
        if seen is not None:
            seen(moments.count)
    if moments.count < 2:
        raise DataError(f"images: {moments.count} in all; legal: 2 or more")
    mean, covariance = moments.result()
    return FeatureStatistics(moments.count, mean, covariance, features.rows, logits.rows, content.hexdigest())


class Moments:
    """Mean and covariance of rows (n, D) that come in batches, in float64 without cancellation (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray = np.zeros(0)
        self._scatter: np.ndarray = np.zeros((0, 0))

    def add(self, rows: np.ndarray) -> None:
        """Take the next rows (n, D)."""
        wide = rows.astype(np.float64)
        mean = wide.mean(axis=0)
        centred = wide - mean
        if not self.count:
            self.count, self._mean, self._scatter = len(wide), mean, centred.T @ centred
            return
        total, shift = self.count + len(wide), mean - self._mean
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(wide) / total)
        self._mean = self._mean + shift * (len(wide) / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D) of two rows or more."""
        return self._mean, self._scatter / (self.count - 1)


class Reservoir:
    """At most `limit` rows of a stream, all equally likely, in their order: a function of the stream's rows only.

    Every row draws a number, and those with the smallest stay. Rows at equal distances would not do: labels of drawn images
    follow one another in a cycle.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._generator = np.random.default_rng(0)
        self._draws: np.ndarray = np.zeros(0)
        self._parts: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take the next rows (n, D)."""
        self._draws = np.concatenate([self._draws, self._generator.random(len(rows))])
        self._parts.append(rows)
        if len(self._draws) > self._limit + self._limit // 4:  # not at every batch: it copies all rows
            self._shrink()

    @property
    def rows(self) -> np.ndarray:
        """The rows that were kept (at most limit, D)."""
        self._shrink()
        return self._parts[0]

    def _shrink(self) -> None:
        rows = np.concatenate(self._parts)
        if len(rows) > self._limit:
            stay = np.sort(np.argpartition(self._draws, self._limit - 1)[: self._limit])
            rows, self._draws = rows[stay], self._draws[stay]
        self._parts = [rows]
