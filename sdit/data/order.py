"""Which sample is read when: pure integers, a function of (seed, shard sizes, streams) and nothing else.

An epoch lays its shuffled shards, each with shuffled members, end to end, cuts that sequence into S equal streams and
deals samples from the streams in turn. Neighbouring samples so come from S distant places, all streams last to the end
of the epoch for any shard sizes, and a reader needs one open shard per stream.
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
    """The sample keys of B run indices as three (B,) int64 columns; iterates as `SampleKey`s."""

    epoch: np.ndarray
    shard: np.ndarray
    member: np.ndarray

    def __iter__(self) -> Iterator[SampleKey]:
        columns = (self.epoch.tolist(), self.shard.tolist(), self.member.tolist())
        return (SampleKey(*key) for key in zip(*columns, strict=True))


class SampleOrder:
    """Maps the index of a sample in the run to its key; every image once per epoch, epochs without gaps between."""

    def __init__(self, counts: Sequence[int], streams: int, seed: int) -> None:
        """`counts` are the samples of each shard, all positive; `streams` is S."""
        assert counts and min(counts) > 0 and streams > 0
        self.samples_per_epoch = sum(counts)
        self._counts = np.asarray(counts, dtype=np.int64)
        self._streams = streams
        self._seed = seed
        # An epoch's table is O(shards), a permutation O(one shard). One of each stream is in use, one ends, one begins.
        self._epoch_table = lru_cache(maxsize=3)(self._compute_epoch_table)
        self._members = lru_cache(maxsize=2 * streams + 2)(self._compute_members)

    def locate(self, indices: np.ndarray) -> KeyColumns:
        """Keys of the run indices (B,) int64 >= 0."""
        epoch, position = np.divmod(np.asarray(indices, dtype=np.int64), self.samples_per_epoch)
        place = self._place(position)
        shard, member = np.empty_like(place), np.empty_like(place)
        for each in np.unique(epoch):
            chosen = epoch == each
            shard[chosen], member[chosen] = self._locate_in_epoch(int(each), place[chosen])
        return KeyColumns(epoch, shard, member)

    def substitutes(self, key: SampleKey) -> Iterator[SampleKey]:
        """The other members of the key's shard, in the epoch's order, beginning after the key and going round."""
        members = self._members(key.epoch, key.shard)
        start = int(np.flatnonzero(members == key.member)[0])
        for member in np.roll(members, -start)[1:].tolist():
            yield SampleKey(key.epoch, key.shard, member)

    def neighbours(self, key: SampleKey) -> Iterator[SampleKey]:
        """One member of each other shard, beginning with the next shard of the index and going round."""
        shards = len(self._counts)
        for step in range(1, shards):
            shard = (key.shard + step) % shards
            yield SampleKey(key.epoch, shard, key.member % int(self._counts[shard]))

    def _place(self, position: np.ndarray) -> np.ndarray:
        """Place in the epoch's end-to-end sequence of position p: stream p mod S, p div S samples into it."""
        shortest, longer = divmod(self.samples_per_epoch, self._streams)
        offset, stream = np.divmod(position, self._streams)
        return stream * shortest + np.minimum(stream, longer) + offset

    def _locate_in_epoch(self, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends = self._epoch_table(epoch)
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        into_shard = place - (ends[slot] - self._counts[shard])
        member = np.empty_like(place)
        for each in np.unique(shard):
            chosen = shard == each
            member[chosen] = self._members(epoch, int(each))[into_shard[chosen]]
        return shard, member

    def _compute_epoch_table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in shuffled order and the places where each of them ends."""
        shards = randomness.permutation(randomness.keys(self._seed, Purpose.SHARD_ORDER, epoch), len(self._counts))
        return shards, np.cumsum(self._counts[shards])

    def _compute_members(self, epoch: int, shard: int) -> np.ndarray:
        return randomness.permutation(
            randomness.keys(self._seed, Purpose.MEMBER_ORDER, epoch, shard), int(self._counts[shard])
        )


def rank_indices(
    first_index: int, global_batch: int, rank: int, ranks: int, micro_step: int = 0, micro_steps: int = 1
) -> np.ndarray:
    """Run indices (global_batch / ranks / micro_steps,) int64 that a rank reads in one micro-step.

    Micro-step a holds the a-th contiguous part of the global batch that starts at `first_index`; a rank takes the
    indices of it that are congruent to `rank` modulo `ranks`, and so touches 1 / gcd(ranks, streams) of the streams.
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
