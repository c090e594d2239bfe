"""Samples of the run, decoded ahead of use by threads.

B samples, C channels, H = W size, O orientations. What a run index yields depends on (seed, index, data) only.
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
from sdit.data.cache import ShardCache
from sdit.data.dataset import Dataset, Shard, check_fit, open_dataset
from sdit.data.decode import Sample
from sdit.data.faults import BadSample, BadShard
from sdit.data.identity import DataIdentity
from sdit.data.ledger import BadSampleLedger
from sdit.data.order import KeyColumns, SampleOrder
from sdit.data.pixels import from_levels
from sdit.errors import DataError
from sdit.randomness import Purpose


def build_loader(data: DataConfig, model: ModelConfig, seed: int, ranks: int = 1) -> Loader:
    """The loader of one of `ranks` ranks; DataError when the data are not there or do not fit the model."""
    dataset = open_dataset(data)
    check_fit(dataset.facts, data, model)
    return Loader(dataset, data, seed, ranks, labelled=model.classes > 0)


class Loader:
    """Reads samples by run index. A context manager; `close` ends its threads."""

    def __init__(self, dataset: Dataset, data: DataConfig, seed: int, ranks: int = 1, labelled: bool = True) -> None:
        self.facts = dataset.facts
        self._dataset = dataset
        self._data = data
        self._seed = seed
        self._labelled = labelled
        self._order = SampleOrder(dataset.counts, data.streams, seed)
        self._ledger = BadSampleLedger(data.max_bad_fraction, dataset.facts.total)
        # A rank with strided indices touches this many streams; each may be between two shards.
        streams = data.streams // math.gcd(data.streams, ranks)
        self._shards = ShardCache(self._open, capacity=2 * streams + 2)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="sdit-data")

    @property
    def identity(self) -> DataIdentity:
        """Which images these are."""
        return DataIdentity.of(self._dataset.facts, self._dataset.fingerprint)

    @property
    def bad_samples(self) -> Counter[str]:
        """Samples replaced by another one so far, by reason."""
        return self._ledger.by_reason

    @property
    def bad_in_epoch(self) -> int:
        """Samples of the newest epoch replaced here."""
        return self._ledger.in_latest_epoch

    @property
    def newest_fault(self) -> str:
        """The newest sample that could not be used here, and why; empty if there was none."""
        return self._ledger.newest_fault

    @property
    def bad_allowed(self) -> float:
        """Bad samples that an epoch may have over all ranks."""
        return self._ledger.allowed

    @property
    def shard_opens(self) -> int:
        """Shards read from storage so far."""
        return self._shards.opens

    def read(self, indices: np.ndarray) -> RawBatch:
        """The samples of the run indices (B,) int64, now and in this thread."""
        keys = self._order.locate(indices)
        opened = {shard: self._shards.get(shard) for shard in dict.fromkeys(keys.shard.tolist())}
        samples = [self._sample(key, opened[key.shard]) for key in keys]
        values = np.stack([sample.values for sample in samples])
        x0 = self._latents(values, keys) if self.facts.kind == "latents" else self._pixels(values, keys)
        y = np.array([sample.label if self._labelled else 0 for sample in samples], dtype=np.int64)
        return RawBatch(index=np.asarray(indices, dtype=np.int64), x0=x0, y=y)

    def batches(self, requests: Iterator[np.ndarray]) -> Iterator[RawBatch]:
        """The batch of each request (B,) of run indices, in order, with `data.prefetch_batches` decoded ahead.

        Requests are taken in the caller's thread; an error of a decoding thread is raised in place of its batch.
        """
        ahead: deque[list[Future[RawBatch]]] = deque()
        try:
            for indices in requests:
                parts = np.array_split(indices, max(1, min(self._data.workers, len(indices))))
                ahead.append([self._pool.submit(self.read, part) for part in parts])
                if len(ahead) > self._data.prefetch_batches:
                    yield _joined(ahead.popleft())
            while ahead:
                yield _joined(ahead.popleft())
        finally:
            for future in chain.from_iterable(ahead):
                future.cancel()

    def close(self) -> None:
        """Drop what was not decoded yet and wait for the threads to end."""
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
        """The key's sample or, where it cannot be used, the one that every rank would take in its place."""
        if isinstance(shard, BadShard):
            self._ledger.record(key, shard)
            return self._substitute(key)
        try:
            return shard.sample(key.member)
        except BadSample as fault:
            self._ledger.record(key, fault)
            return self._substitute(key)

    def _substitute(self, key: SampleKey) -> Sample:
        """The next good sample of the key's shard in the epoch's order; of the next shard if it has none; and so on."""
        for start in chain([key], self._order.neighbours(key)):
            shard = self._shards.get(start.shard)
            if isinstance(shard, BadShard):
                continue
            for candidate in chain([start], self._order.substitutes(start)):
                try:
                    return shard.sample(candidate.member)
                except BadSample:
                    continue  # it is counted when its own turn comes
        raise DataError("no sample of the whole data set can be read")

    def _pixels(self, values: np.ndarray, keys: KeyColumns) -> np.ndarray:
        """Pixels (B, C, H, W) uint8 -> float32 in [-1, 1], half of them mirrored if asked for."""
        mirrored = self._mirrored(keys)
        values[mirrored] = values[mirrored, ..., ::-1]
        return from_levels(values)

    def _latents(self, values: np.ndarray, keys: KeyColumns) -> np.ndarray:
        """Moments (B, O, 2C, H, W) -> a posterior draw (B, C, H, W) float32, scaled: mean + exp(logvar / 2) eps."""
        orientation = self._mirrored(keys).astype(np.int64)
        moments = values[np.arange(len(values)), orientation].astype(np.float32)
        mean, log_variance = np.split(moments, 2, axis=1)
        key = randomness.keys(self._seed, Purpose.POSTERIOR, keys.epoch, keys.shard, keys.member)
        eps = randomness.normals(key, mean[0].size).reshape(mean.shape)
        x0: np.ndarray = (mean + np.exp(log_variance / 2) * eps) * np.float32(self._data.latent_scale)
        return x0

    def _mirrored(self, keys: KeyColumns) -> np.ndarray:
        """Which samples are mirrored (B,) bool: a fair coin of each key, or none."""
        if not self._data.flip:
            return np.zeros(len(keys.epoch), dtype=np.bool_)
        return randomness.coins(randomness.keys(self._seed, Purpose.FLIP, keys.epoch, keys.shard, keys.member))


def _joined(parts: list[Future[RawBatch]]) -> RawBatch:
    batches = [part.result() for part in parts]
    if len(batches) == 1:
        return batches[0]
    return RawBatch(
        index=np.concatenate([batch.index for batch in batches]),
        x0=np.concatenate([batch.x0 for batch in batches]),
        y=np.concatenate([batch.y for batch in batches]),
    )
