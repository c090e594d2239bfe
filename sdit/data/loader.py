"""The data loader: reads samples by run index and decodes them in threads.

B samples, C channels, H = W size, O orientations. The sample of a run index depends only on (seed, index, data).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import TracebackType

import numpy as np

from sdit import randomness
from sdit.config import DataConfig, ModelConfig
from sdit.contracts import RawBatch, SampleKey
from sdit.data.bad_samples import BadSampleCounter
from sdit.data.cache import ShardCache
from sdit.data.dataset import Dataset, Shard, check_fit, open_dataset
from sdit.data.decode import Sample
from sdit.data.faults import BadSample, BadShard
from sdit.data.identity import DataIdentity
from sdit.data.order import KeyColumns, SampleOrder
from sdit.data.pixels import from_levels
from sdit.errors import DataError
from sdit.randomness import Purpose


def build_loader(data: DataConfig, model: ModelConfig, seed: int, ranks: int = 1) -> Loader:
    """Return the loader of one of `ranks` ranks.

    Raises: DataError: if the data do not exist or do not fit the model.
    """
    dataset = open_dataset(data)
    check_fit(dataset.facts, data, model)
    return Loader(dataset, data, seed, ranks, labelled=model.classes > 0)


class Loader:
    """Reads samples by run index. It is a context manager, and `close` ends its threads."""

    def __init__(self, dataset: Dataset, data: DataConfig, seed: int, ranks: int = 1, labelled: bool = True) -> None:
        self.facts = dataset.facts
        self._dataset = dataset
        self._data = data
        self._seed = seed
        self._labelled = labelled
        self._order = SampleOrder(dataset.counts, data.streams, seed)
        self._bad_samples = BadSampleCounter(data.max_bad_fraction, dataset.facts.total)
        # A rank reads strided indices, so it touches this many streams. Each stream may be between two shards.
        streams = data.streams // math.gcd(data.streams, ranks)
        self._shards = ShardCache(self._open, capacity=2 * streams + 2)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="sdit-data")

    @property
    def identity(self) -> DataIdentity:
        """The identity of the data set."""
        return DataIdentity.of(self._dataset.facts, self._dataset.fingerprint)

    @property
    def bad_samples(self) -> Counter[str]:
        """The number of samples that were replaced so far, by reason."""
        return self._bad_samples.by_reason

    @property
    def bad_in_epoch(self) -> int:
        """The number of samples that this rank replaced in the newest epoch that had any."""
        return self._bad_samples.in_latest_epoch

    @property
    def newest_fault(self) -> str:
        """The newest sample that this rank could not use, and the reason. Empty if there was none."""
        return self._bad_samples.newest_fault

    @property
    def bad_allowed(self) -> float:
        """The number of bad samples that an epoch may have, over all ranks."""
        return self._bad_samples.allowed

    @property
    def shard_opens(self) -> int:
        """The number of shards read from storage so far."""
        return self._shards.opens

    def read(self, indices: np.ndarray) -> RawBatch:
        """Return the samples of the run indices (B,) int64. They are decoded in the calling thread."""
        keys = self._order.locate(indices)
        opened = {shard: self._shards.get(shard) for shard in dict.fromkeys(keys.shard.tolist())}
        samples = [self._sample(key, opened[key.shard]) for key in keys]
        values = np.stack([sample.values for sample in samples])
        x0 = self._latents(values, keys) if self.facts.kind == "latents" else self._pixels(values, keys)
        y = np.array([sample.label if self._labelled else 0 for sample in samples], dtype=np.int64)
        return RawBatch(index=np.asarray(indices, dtype=np.int64), x0=x0, y=y)

    def batches(self, requests: Iterator[np.ndarray]) -> Iterator[RawBatch]:
        """Yield the batch of each request, in order. A request is an array (B,) of run indices.

        `data.prefetch_batches` batches are decoded ahead. Requests are taken in the caller's thread. If a decoding thread
        raises an error, it is raised here in place of its batch.
        """
        ahead: deque[list[Future[RawBatch]]] = deque()
        try:
            for indices in requests:
                slices = np.array_split(indices, max(1, min(self._data.workers, len(indices))))
                ahead.append([self._pool.submit(self.read, each) for each in slices])
                if len(ahead) > self._data.prefetch_batches:
                    yield _joined(ahead.popleft())
            while ahead:
                yield _joined(ahead.popleft())
        finally:
            for future in chain.from_iterable(ahead):
                future.cancel()

    def close(self) -> None:
        """Cancel the pending decoding and wait for the threads to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, shard: int) -> Shard | BadShard:
        try:
            return self._dataset.open(shard)
        except BadShard as fault:
            return fault

    def _sample(self, key: SampleKey, shard: Shard | BadShard) -> Sample:
        """Return the sample of a key. If it cannot be used, return a substitute that is the same on each rank."""
        if isinstance(shard, BadShard):
            self._bad_samples.record(key, shard)
            return self._substitute(key)
        try:
            return shard.sample(key.member)
        except BadSample as fault:
            self._bad_samples.record(key, fault)
            return self._substitute(key)

    def _substitute(self, key: SampleKey) -> Sample:
        """Return the next good sample of the key's shard, in the order of the epoch.

        If the shard has none, the following shards are tried.

        Raises: DataError: if no sample of the data set can be read.
        """
        for start in chain([key], self._order.neighbours(key)):
            shard = self._shards.get(start.shard)
            if isinstance(shard, BadShard):
                continue
            for candidate in chain([start], self._order.substitutes(start)):
                try:
                    return shard.sample(candidate.member)
                except BadSample:
                    continue  # it is counted when its own run index is read
        raise DataError("no sample of the whole data set can be read")

    def _pixels(self, values: np.ndarray, keys: KeyColumns) -> np.ndarray:
        """Convert pixels (B, C, H, W) uint8 to float32 in [-1, 1]. If `data.flip` is set, half of them are mirrored."""
        mirrored = self._mirrored(keys)
        values[mirrored] = values[mirrored, ..., ::-1]
        return from_levels(values)

    def _latents(self, values: np.ndarray, keys: KeyColumns) -> np.ndarray:
        """Return one posterior sample (B, C, H, W) float32 of each of the moments (B, O, 2C, H, W), scaled.

        A sample is mean + exp(logvar / 2) eps.
        """
        orientation = self._mirrored(keys).astype(np.int64)
        moments = values[np.arange(len(values)), orientation].astype(np.float32)
        mean, log_variance = np.split(moments, 2, axis=1)
        key = randomness.keys(self._seed, Purpose.POSTERIOR, keys.epoch, keys.shard, keys.member)
        eps = randomness.normals(key, mean[0].size).reshape(mean.shape)
        x0: np.ndarray = (mean + np.exp(log_variance / 2) * eps) * np.float32(self._data.latent_scale)
        return x0

    def _mirrored(self, keys: KeyColumns) -> np.ndarray:
        """Return (B,) bool, True for mirrored samples: one fair coin per key, or all False."""
        if not self._data.flip:
            return np.zeros(len(keys.epoch), dtype=np.bool_)
        return randomness.coins(randomness.keys(self._seed, Purpose.FLIP, keys.epoch, keys.shard, keys.member))


def _joined(futures: list[Future[RawBatch]]) -> RawBatch:
    batches = [future.result() for future in futures]
    if len(batches) == 1:
        return batches[0]
    return RawBatch(
        index=np.concatenate([batch.index for batch in batches]),
        x0=np.concatenate([batch.x0 for batch in batches]),
        y=np.concatenate([batch.y for batch in batches]),
    )
