"""The data loader: reads samples by run index and decodes them in threads.

B samples, C channels, H = W size, O orientations. The sample of a run index depends only on (seed, index, data).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np

from sdit import randomness
from sdit.config import DataConfig, ModelConfig
from sdit.contracts import RawBatch, SampleKey
from sdit.data.bad_samples import BadSample, BadSampleCounter, BadShard
from sdit.data.cache import ShardCache
from sdit.data.dataset import Dataset, Shard, check_fit, latent_stats_of, open_dataset
from sdit.data.decode import Sample
from sdit.data.identity import DataIdentity
from sdit.data.latent_stats import LatentScaling, LatentStatistics
from sdit.data.order import KeyColumns, SampleOrder
from sdit.data.pixels import from_levels
from sdit.errors import DataError
from sdit.randomness import Purpose

# Latents are sampled in parts whose arrays stay in a core's cache. To free larger ones takes time with the interpreter lock.
PART_VALUES = 2**17

Request = TypeVar("Request")
Made = TypeVar("Made")


def build_loader(data: DataConfig, model: ModelConfig, seed: int, ranks: int = 1) -> Loader:
    """Return the loader of one of `ranks` ranks.

    Raises: DataError: if the data do not exist or do not fit the model.
    """
    dataset = open_dataset(data, model)
    check_fit(dataset.facts, data, model)
    statistics = latent_stats_of(data, dataset.facts)
    if statistics is not None:
        statistics.check_fit(model.channels, model.input_size, str(data.latent_stats))
    return Loader(dataset, data, seed, ranks, labelled=model.classes > 0, latent_stats=statistics)


class Loader:
    """Reads samples by run index. It is a context manager, and `close` ends its threads.

    `bad_samples` counts the samples that were replaced so far. `shards` holds the open shards.
    """

    def __init__(
        self, dataset: Dataset, data: DataConfig, seed: int, ranks: int = 1, labelled: bool = True,
        latent_stats: LatentStatistics | None = None,
    ) -> None:  # fmt: skip
        self.facts = dataset.facts
        self._dataset = dataset
        self._data = data
        self._seed = seed
        self._labelled = labelled
        self._scaling = LatentScaling(data.latent_scale, latent_stats)
        self._order = SampleOrder(dataset.counts, data.streams, seed)
        self.bad_samples = BadSampleCounter(data.max_bad_fraction, dataset.facts.total)
        # A rank reads strided indices, so it touches this many streams. Each stream may be between two shards.
        streams = data.streams // math.gcd(data.streams, ranks)
        self.shards = ShardCache(self._open, capacity=2 * streams + 2)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="sdit-data")

    @property
    def identity(self) -> DataIdentity:
        """The identity of the data set."""
        return DataIdentity.of(self._dataset.facts, self._dataset.fingerprint, self._scaling.statistics)

    def read(self, indices: np.ndarray) -> RawBatch:
        """Return the samples of the run indices (B,) int64. They are decoded in the calling thread."""
        keys = self._order.locate(indices)
        mirrored = self._mirrored(keys)
        values, y = self._stored(keys, mirrored)
        x0 = self._latents(values, keys) if self.facts.kind == "latents" else _pixels(values, mirrored)
        return RawBatch(index=np.asarray(indices, dtype=np.int64), x0=x0, y=y if self._labelled else np.zeros_like(y))

    def prefetch(self, requests: Iterable[Request], make: Callable[[Request], Made]) -> Iterator[Made]:
        """Yield `make(request)` of each request, in order. The loader's threads call `make`.

        `data.prefetch_batches` requests are made ahead, or one for each thread if that is more. Requests are taken in the
        caller's thread. If `make` raises an error, it is raised here.
        """
        ahead: deque[Future[Made]] = deque()
        try:
            for request in requests:
                ahead.append(self._pool.submit(make, request))
                if len(ahead) > max(self._data.prefetch_batches, self._data.workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """Cancel the pending decoding and wait for the threads to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, shard: int) -> Shard | BadShard:
        try:
            return self._dataset.open(shard)
        except BadShard as fault:
            return fault

    def _stored(self, keys: KeyColumns, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored values and the labels (B,) int64 of samples.

        Values are pixels (B, C, H, W) uint8, not mirrored yet, or moments (B, 2C, H, W) float32 of the orientation that
        `mirrored` (B,) selects.
        """
        facts, count = self.facts, len(keys.shard)
        is_latents = facts.kind == "latents"
        channels = 2 * facts.channels if is_latents else facts.channels
        values = np.empty((count, channels, facts.size, facts.size), np.float32 if is_latents else np.uint8)
        labels = np.empty(count, dtype=np.int64)
        is_read = np.zeros(count, dtype=np.bool_)
        opened = {shard: self.shards.get(shard) for shard in dict.fromkeys(keys.shard.tolist())}
        for number, shard in opened.items():
            if isinstance(shard, BadShard) or shard.decoded is None:
                continue
            at = np.flatnonzero(keys.shard == number)
            at = at[shard.decoded.row[keys.member[at]] >= 0]
            members = keys.member[at]
            labels[at] = shard.decoded.labels[members]
            is_read[at] = True
            # An index array would first collect the samples in new memory, which takes longer than to copy them.
            for position, row in zip(at.tolist(), shard.decoded.row[members].tolist(), strict=True):
                stored = shard.decoded.values[row]
                values[position] = stored[int(mirrored[position])] if is_latents else stored
        rest = np.flatnonzero(~is_read)
        for position, key in zip(rest.tolist(), keys[rest], strict=True):
            sample = self._sample(key, opened[key.shard])
            values[position] = sample.values[int(mirrored[position])] if is_latents else sample.values
            labels[position] = sample.label
        return values, labels

    def _sample(self, key: SampleKey, shard: Shard | BadShard) -> Sample:
        """Return the sample of a key. If it cannot be used, return a substitute that is the same on each rank."""
        if isinstance(shard, BadShard):
            self.bad_samples.record(key, shard)
            return self._substitute(key)
        try:
            return shard.sample(key.member)
        except (BadSample, BadShard) as fault:
            self.bad_samples.record(key, fault)
            return self._substitute(key)

    def _substitute(self, key: SampleKey) -> Sample:
        """Return the next good sample of the key's shard, in the order of the epoch.

        If the shard has none, the following shards are tried.

        Raises: DataError: if no sample of the data set can be read.
        """
        for start in chain([key], self._order.neighbours(key)):
            shard = self.shards.get(start.shard)
            if isinstance(shard, BadShard):
                continue
            for candidate in chain([start], self._order.substitutes(start)):
                try:
                    return shard.sample(candidate.member)
                except (BadSample, BadShard):
                    continue  # it is counted when its own run index is read
        raise DataError("no sample of the whole data set can be read")

    def _latents(self, moments: np.ndarray, keys: KeyColumns) -> np.ndarray:
        """Return one posterior sample (B, C, H, W) float32 of each of the moments (B, 2C, H, W) float32, normalised.

        A sample is mean + exp(logvar / 2) eps.
        """
        mean, log_variance = np.split(moments, 2, axis=1)
        key = randomness.keys(self._seed, Purpose.POSTERIOR, keys.epoch, keys.shard, keys.member)
        sampled = np.empty(mean.shape, np.float32)
        rows = max(1, PART_VALUES // mean[0].size)
        for part in (slice(start, start + rows) for start in range(0, len(mean), rows)):
            eps = randomness.normals(key[part], mean[0].size).reshape(mean[part].shape)
            deviation = np.exp(log_variance[part] / 2)
            np.add(mean[part], np.multiply(deviation, eps, out=eps), out=sampled[part])
            sampled[part] = self._scaling.normalise(sampled[part])
        return sampled

    def _mirrored(self, keys: KeyColumns) -> np.ndarray:
        """Return (B,) bool, True for mirrored samples: one fair coin per key, or all False."""
        if not self._data.flip:
            return np.zeros(len(keys.epoch), dtype=np.bool_)
        return randomness.coins(randomness.keys(self._seed, Purpose.FLIP, keys.epoch, keys.shard, keys.member))


def _pixels(values: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Convert pixels (B, C, H, W) uint8 to float32 in [-1, 1]. Mirror those with `mirrored` (B,)."""
    values[mirrored] = values[mirrored, ..., ::-1]
    return from_levels(values)
