"""The shared metrics file of a rank, in shared memory. The node's exporter can always read it, also if the rank hangs.

    status        JSON, written by the rank's supervisor twice a second
    description   JSON, written once by the rank: the series that its numbers belong to
    values        float64, written by the rank at every step

Each section has two slots. Writers alternate between them and add a checksum. If a writer is stopped or killed during a write,
the other slot still holds the previous content, so no process waits for another. The code uses plain writes, not a memory
mapping: if shared memory is full, a write raises an error, but a mapping would end the process. The file is sparse: only
written bytes use memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import struct
import tempfile
import time
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

from sdit.metrics.specs import METRICS, RUN_STATES

PREFIX = "sdit-page-"
STATUS_BYTES, DESCRIPTION_BYTES, VALUES_BYTES = 4096, 1 << 22, 1 << 20  # of one slot; 131,000 numbers
MAX_READS = 10  # a reader that sees a concurrent write reads again
FRESH_SECONDS = 60.0  # a younger file may not be locked yet
_HEAD = struct.Struct("=QII")  # number of writes, length, checksum
_SCHEMA = struct.Struct("=I")  # values begin with the checksum of the description they belong to

Series = tuple[str, tuple[str, ...]]  # a metric's name and its label values


def shared_folder() -> Path:
    """Return the folder of this machine's shared metrics files."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def shared_path(nonce: str) -> Path:
    """Return the path of the file of the rank whose supervisor has this `nonce`. Each launch has new nonces."""
    return shared_folder() / f"{PREFIX}{nonce}"


class _Section:
    """One section of a shared metrics file."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size = descriptor, offset, size
        newest = self._newest()
        self._writes = newest[0] if newest else 0

    def write(self, data: bytes) -> None:
        """Write the content of the section.

        Raises:
            OSError: if shared memory is full.
            ValueError: if `data` is too long.
        """
        if _HEAD.size + len(data) > self._size:
            raise ValueError(
                f"{len(data)} bytes do not fit into a section of {self._size} bytes of a shared metrics file"
            )
        self._writes += 1
        head = _HEAD.pack(self._writes, len(data), zlib.crc32(data))
        if os.pwrite(self._descriptor, head + data, self._slot(self._writes)) < len(head) + len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self) -> bytes | None:
        """Return the newest complete content, or None if nothing is written yet."""
        newest = None
        for _ in range(MAX_READS):
            heads = self._heads()
            newest = self._newest()
            if heads == self._heads():
                break
        return newest[1] if newest else None

    def _slot(self, writes: int) -> int:
        return self._offset + writes % 2 * self._size

    def _heads(self) -> list[bytes]:
        return [os.pread(self._descriptor, _HEAD.size, self._slot(slot)) for slot in (0, 1)]

    def _newest(self) -> tuple[int, bytes] | None:
        found = []
        for slot, head in enumerate(self._heads()):
            if len(head) < _HEAD.size:
                continue
            writes, length, checksum = _HEAD.unpack(head)
            data = os.pread(self._descriptor, min(length, self._size), self._slot(slot) + _HEAD.size)
            if writes and len(data) == length and zlib.crc32(data) == checksum:
                found.append((writes, data))
        return max(found, default=None)


@dataclass(frozen=True)
class RankStatus:
    """The status of a rank, as its supervisor reports it. Times are seconds of this machine's monotonic clock.

    `alive_at` is the last time at which the rank's process ran any Python. `ends` counts ended processes by cause.
    """

    rank: int
    is_up: bool
    step: int
    state: str
    deadline_seconds: float
    progress_at: float
    alive_at: float
    written_at: float
    restarts: int = 0
    preemptions: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in RUN_STATES, self.state


class SharedMetricsFile:
    """An open shared metrics file, for the supervisor that owns it and for readers."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._status = _Section(descriptor, 0, STATUS_BYTES)
        self.description = _Section(descriptor, 2 * STATUS_BYTES, DESCRIPTION_BYTES)
        self.values = _Section(descriptor, 2 * (STATUS_BYTES + DESCRIPTION_BYTES), VALUES_BYTES)

    @classmethod
    def create(cls, nonce: str) -> SharedMetricsFile:
        """Create a file. Its lock shows that it is in use, until it is closed or the process ends.

        Raises: OSError: if it cannot be created.
        """
        path = shared_path(nonce)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> SharedMetricsFile:
        """Open an existing file.

        Raises: FileNotFoundError: if the rank is not on this machine or has ended.
        """
        return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        os.close(self._descriptor)

    def write_status(self, status: RankStatus) -> None:
        """Write the status of the rank.

        Raises: OSError: if shared memory is full.
        """
        self._status.write(json.dumps(asdict(status)).encode())

    def status(self) -> RankStatus | None:
        """Return the supervisor's newest status, or None if there is none yet."""
        data = self._status.read()
        return RankStatus(**json.loads(data)) if data is not None else None

    def numbers(self) -> Iterator[tuple[Series, Sequence[float]]]:
        """Yield each series of the rank and its numbers: one number, or the counts and the sum of a histogram."""
        description, data = self.description.read(), self.values.read()
        if description is None or data is None or _SCHEMA.unpack_from(data)[0] != zlib.crc32(description):
            return
        values, at = array("d", data[_SCHEMA.size :]), 0
        for name, labels in json.loads(description):
            width = METRICS[name].width
            yield (name, tuple(labels)), values[at : at + width]
            at += width


def remove_abandoned_files() -> None:
    """Remove the files of killed supervisors, except those of other users."""
    for path in shared_folder().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # already removed, of another user, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > FRESH_SECONDS:
                path.unlink()


class SharedMetricsWriter:
    """Writes the numbers of a rank. Counters continue from the rank's previous process, so they never decrease."""

    def __init__(self, path: Path, series: Sequence[Series]) -> None:
        self._file = SharedMetricsFile.open(path)
        offsets = accumulate((METRICS[name].width for name, _ in series), initial=0)
        self._offsets = dict(zip(series, offsets, strict=False))
        description = json.dumps(series).encode()
        before = {key: list(values) for key, values in self._file.numbers()}
        self._values = array("d")
        for name, labels in series:
            fresh = [math.nan if METRICS[name].kind == "gauge" else 0.0] * METRICS[name].width
            self._values.extend(before.get((name, labels), fresh))
        self._schema = _SCHEMA.pack(zlib.crc32(description))
        self._file.description.write(description)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge. NaN means unknown."""
        self._values[self._offsets[name, labels]] = value

    def add(self, name: str, value: float, *labels: str) -> None:
        """Increase a counter."""
        self._values[self._offsets[name, labels]] += value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add one value to a histogram."""
        first, buckets = self._offsets[name, labels], METRICS[name].buckets
        self._values[first + bisect_left(buckets, value)] += 1
        self._values[first + len(buckets) + 1] += value

    def publish(self) -> None:
        """Make the numbers visible to readers.

        Raises: OSError: if shared memory is full.
        """
        self._file.values.write(self._schema + self._values.tobytes())

    def close(self) -> None:
        self._file.close()
