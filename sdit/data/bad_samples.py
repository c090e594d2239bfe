"""Errors of shards and samples that cannot be used, and a counter of them that stops the run if there are too many.

The reasons are fixed because they are labels of a metric.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Literal

from sdit.contracts import SampleKey
from sdit.errors import DataError

_log = logging.getLogger(__name__)

ShardReason = Literal["missing", "size", "checksum", "archive", "forbidden_member", "count"]
SampleReason = Literal["no_image", "no_label", "undecodable", "wrong_size", "wrong_channels", "non_finite", "bad_label"]


class BadShard(DataError):
    """An error of a whole shard: none of its samples may be used."""

    def __init__(self, reason: ShardReason, shard: str, detail: str) -> None:
        super().__init__(reason, shard, detail)
        self.reason, self.shard, self.detail = reason, shard, detail

    def __str__(self) -> str:
        return f"{self.shard}: {self.detail} ({self.reason})"


class BadSample(DataError):
    """An error of one sample. The other samples of its shard may be used."""

    def __init__(self, reason: SampleReason, shard: str, key: str, detail: str) -> None:
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.detail} ({self.reason})"


class BadSampleCounter:
    """Counts bad samples `by_reason` since the start of this process, and per epoch.

    Ranks have unequal numbers of bad shards. A rank therefore stops only if its own number exceeds the limit of the whole run.
    The trainer also sums `in_latest_epoch` over all ranks. The counts are not stored in checkpoints.
    """

    def __init__(self, max_bad_fraction: float, samples_per_epoch: int) -> None:
        self.by_reason: Counter[str] = Counter()
        self.newest_fault = ""
        self._fraction = max_bad_fraction
        self.allowed = max_bad_fraction * samples_per_epoch
        self._in_epoch: Counter[int] = Counter()
        self._named_shards: set[str] = set()
        self._lock = threading.Lock()

    @property
    def in_latest_epoch(self) -> int:
        """The number of bad samples that this rank found in the newest epoch that had any."""
        return self._in_epoch[max(self._in_epoch, default=0)]

    def record(self, key: SampleKey, fault: BadShard | BadSample) -> None:
        """Count one bad sample.

        Raises: DataError: if the epoch now has more bad samples than allowed. The message names the sample.
        """
        with self._lock:
            self.by_reason[fault.reason] += 1
            self.newest_fault = str(fault)
            self._in_epoch[key.epoch] += 1
            bad = self._in_epoch[key.epoch]
            named = isinstance(fault, BadShard) and fault.shard in self._named_shards
            self._named_shards.add(fault.shard)
        if not named:  # log a bad shard once, because each of its samples fails
            _log.warning("%s%s", fault, "" if bad > self.allowed else "; another sample replaces it")
        if bad > self.allowed:
            raise DataError(
                f"{fault}; {bad} bad samples in epoch {key.epoch}, "
                f"data.max_bad_fraction {self._fraction:g} allows {int(self.allowed)}"
            )
