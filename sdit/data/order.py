"""The order in which samples are read: a pure function of (seed, shard sizes, streams).

In each epoch the shards are shuffled, and so are the samples of each shard. The shards are laid end to end in one
sequence. The sequence is cut into S equal streams, and samples are taken from the streams in turn. This has three
effects. Consecutive samples come from S distant positions. All streams end with the epoch, for any shard sizes. A
reader needs one open shard per stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sdit import randomness
from sdit.contracts import SampleKey
from sdit.errors import ConfigError
from sdit.randomness import Purpose


@dataclass(frozen=True)
class KeyColumns:
    """The sample keys of B run indices as three (B,) int64 columns. Iteration yields `SampleKey`s."""

    epoch: np.ndarray
    shard: np.ndarray
    member: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> KeyColumns:
        """Return the keys at the positions `rows` (n,)."""
        return KeyColumns(self.epoch[rows], self.shard[rows], self.member[rows])

    def __iter__(self) -> Iterator[SampleKey]:
        columns = (self.epoch.tolist(), self.shard.tolist(), self.member.tolist())
        return (SampleKey(*key) for key in zip(*columns, strict=True))


class SampleOrder:
    """Maps a run index to a sample key. Each image occurs once per epoch, and epochs follow each other without gaps."""

    def __init__(self, counts: Sequence[int], streams: int, seed: int) -> None:
        """Take the number of samples of each shard, all positive, and the number of streams S."""
        assert counts and min(counts) > 0 and streams > 0
        self.samples_per_epoch = sum(counts)
        self._counts = np.asarray(counts, dtype=np.int64)
        self._streams = streams
        self._seed = seed
        # An epoch's table takes O(shards) memory, a permutation O(samples of a shard).
        # Each stream needs the permutation of at most two shards: one that ends and one that begins.
        self._epoch_table = lru_cache(maxsize=3)(self._compute_epoch_table)
        self._members = lru_cache(maxsize=2 * streams + 2)(self._compute_members)

    def locate(self, indices: np.ndarray) -> KeyColumns:
        """Return the sample keys of the run indices (B,) int64 >= 0."""
        epoch, position = np.divmod(np.asarray(indices, dtype=np.int64), self.samples_per_epoch)
        offset_in_epoch = self._offset(position)
        shard, member = np.empty_like(offset_in_epoch), np.empty_like(offset_in_epoch)
        for each in np.unique(epoch):
            chosen = epoch == each
            shard[chosen], member[chosen] = self._locate_in_epoch(int(each), offset_in_epoch[chosen])
        return KeyColumns(epoch, shard, member)

    def substitutes(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield the other samples of the key's shard in the epoch's order, starting after the key and wrapping around."""
        members = self._members(key.epoch, key.shard)
        start = int(np.flatnonzero(members == key.member)[0])
        for member in np.roll(members, -start)[1:].tolist():
            yield SampleKey(key.epoch, key.shard, member)

    def neighbours(self, key: SampleKey) -> Iterator[SampleKey]:
        """Yield one sample of each other shard, starting with the next shard of the index and wrapping around."""
        shards = len(self._counts)
        for step in range(1, shards):
            shard = (key.shard + step) % shards
            yield SampleKey(key.epoch, shard, key.member % int(self._counts[shard]))

    def _offset(self, position: np.ndarray) -> np.ndarray:
        """Return the offset in the epoch's sequence of each position p.

        Position p is sample p div S of stream p mod S.
        """
        shortest, longer = divmod(self.samples_per_epoch, self._streams)
        offset, stream = np.divmod(position, self._streams)
        return stream * shortest + np.minimum(stream, longer) + offset

    def _locate_in_epoch(self, epoch: int, offset_in_epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends = self._epoch_table(epoch)
        slot = np.searchsorted(ends, offset_in_epoch, side="right")
        shard = shards[slot]
        into_shard = offset_in_epoch - (ends[slot] - self._counts[shard])
        member = np.empty_like(offset_in_epoch)
        for each in np.unique(shard):
            chosen = shard == each
            member[chosen] = self._members(epoch, int(each))[into_shard[chosen]]
        return shard, member

    def _compute_epoch_table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shards in shuffled order and the offset at which each of them ends."""
        shards = randomness.permutation(randomness.keys(self._seed, Purpose.SHARD_ORDER, epoch), len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def _compute_members(self, epoch: int, shard: int) -> np.ndarray:
        return randomness.permutation(
            randomness.keys(self._seed, Purpose.MEMBER_ORDER, epoch, shard), int(self._counts[shard])
        )


def rank_indices(
    first_index: int, global_batch: int, rank: int, ranks: int, micro_step: int = 0, micro_steps: int = 1
) -> np.ndarray:
    """Return the run indices (global_batch / ranks / micro_steps,) int64 that a rank reads in one micro-step.

    Micro-step a covers the a-th contiguous range of the global batch that starts at `first_index`. A rank reads the
    indices of this range that are congruent to `rank` modulo `ranks`. It therefore touches only 1 / gcd(ranks, streams)
    of the streams.

    Raises: ConfigError: if the global batch is not divisible by ranks x micro-steps.
    """
    if global_batch % (ranks * micro_steps):
        raise ConfigError(
            f"train.global_batch: {global_batch} does not divide evenly among {ranks} ranks x {micro_steps} micro-steps"
            f"; legal: multiples of {ranks * micro_steps}"
        )
    assert 0 <= rank < ranks and 0 <= micro_step < micro_steps
    size = global_batch // micro_steps
    start = first_index + micro_step * size
    return np.arange(start + (rank - start) % ranks, start + size, ranks, dtype=np.int64)
