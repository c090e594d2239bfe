"""Counts the samples that could not be used, and stops the run when there are too many."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from sdit.contracts import SampleKey
from sdit.data.faults import BadSample, BadShard
from sdit.errors import DataError

_log = logging.getLogger(__name__)


class BadSampleLedger:
    """Bad samples `by_reason`, of the whole run so far, and per epoch against what is allowed.

    Ranks meet bad shards unevenly, so a single rank is stopped only by what the whole run is allowed; the trainer sums
    `in_latest_epoch` over the ranks. A run that resumes begins to count anew.
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
        """Bad samples met here in the newest epoch that had any."""
        return self._in_epoch[max(self._in_epoch, default=0)]

    def record(self, key: SampleKey, fault: BadShard | BadSample) -> None:
        """Count one sample; DataError, naming it, when the epoch now has more than the allowed number."""
        with self._lock:
            self.by_reason[fault.reason] += 1
            self.newest_fault = str(fault)
            self._in_epoch[key.epoch] += 1
            bad = self._in_epoch[key.epoch]
            named = isinstance(fault, BadShard) and fault.shard in self._named_shards
            self._named_shards.add(fault.shard)
        if not named:  # one line per bad shard suffices: each of its samples fails
            _log.warning("%s%s", fault, "" if bad > self.allowed else "; another sample takes its place")
        if bad > self.allowed:
            raise DataError(
                f"{fault}; {bad} bad samples in epoch {key.epoch}, "
                f"data.max_bad_fraction {self._fraction:g} allows {int(self.allowed)}"
            )
