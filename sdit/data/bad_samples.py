"""A counter of samples that cannot be used. It stops the run if there are too many."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from sdit.contracts import SampleKey
from sdit.data.faults import BadSample, BadShard
from sdit.errors import DataError

_log = logging.getLogger(__name__)


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
