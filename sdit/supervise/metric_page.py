"""A rank's metrics page: a file in shared memory, which the node's exporter reads whatever the rank is doing.

    watch         JSON, written by the rank's supervisor twice a second
    description   JSON, written once by the rank: which series its numbers belong to
    values        float64, written by the rank at every step

Each part has two places that are written in turn, with a checksum, so that a writer that is stopped or killed half-way leaves
the previous text whole, and nobody waits for anybody. Plain writes are used, not a mapping: full shared memory is then an error
to be told, where a mapping would end the process. The file is sparse: only what was written takes memory.
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

from sdit.supervise.metric_families import FAMILIES, RUN_STATES

PREFIX = "sdit-page-"
WATCH_BYTES, DESCRIPTION_BYTES, VALUES_BYTES = 4096, 1 << 22, 1 << 20  # of one place; 131,000 numbers
READS = 10  # a reader that sees a write under way looks again
FRESH_SECONDS = 60.0
_HEAD = struct.Struct("=QII")  # writes so far, length, checksum
_SCHEMA = struct.Struct("=I")  # values begin with the checksum of the description they belong to

Series = tuple[str, tuple[str, ...]]  # a metric's name and its label values


def page_folder() -> Path:
    """Where this machine's pages lie."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def page_path(nonce: str) -> Path:
    """The page of the rank whose supervisor is known by `nonce`: files of other launches have other names."""
    return page_folder() / f"{PREFIX}{nonce}"


class _Part:
    """One part of a page."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size = descriptor, offset, size
        newest = self._newest()
        self._writes = newest[0] if newest else 0

    def write(self, data: bytes) -> None:
        """Raises: OSError when shared memory is full, ValueError when `data` is too long."""
        if _HEAD.size + len(data) > self._size:
            raise ValueError(f"{len(data)} bytes do not fit into a part of {self._size} of a metrics page")
        self._writes += 1
        head = _HEAD.pack(self._writes, len(data), zlib.crc32(data))
        if os.pwrite(self._descriptor, head + data, self._place(self._writes)) < len(head) + len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self) -> bytes | None:
        """What was last written whole; None: nothing yet."""
        newest = None
        for _ in range(READS):
            heads = self._heads()
            newest = self._newest()
            if heads == self._heads():
                break
        return newest[1] if newest else None

    def _place(self, writes: int) -> int:
        return self._offset + writes % 2 * self._size

    def _heads(self) -> list[bytes]:
        return [os.pread(self._descriptor, _HEAD.size, self._place(place)) for place in (0, 1)]

    def _newest(self) -> tuple[int, bytes] | None:
        found = []
        for place, head in enumerate(self._heads()):
            if len(head) < _HEAD.size:
                continue
            writes, length, checksum = _HEAD.unpack(head)
            data = os.pread(self._descriptor, min(length, self._size), self._place(place) + _HEAD.size)
            if writes and len(data) == length and zlib.crc32(data) == checksum:
                found.append((writes, data))
        return max(found, default=None)


@dataclass(frozen=True)
class Watch:
    """What a rank's supervisor knows of it; times are this machine's monotonic clock, in seconds."""

    rank: int
    is_up: bool
    step: int
    state: str
    deadline_seconds: float
    progress_at: float
    tick_at: float
    written_at: float
    restarts: int = 0
    preemptions: int = 0
    ends: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in RUN_STATES, self.state


class Page:
    """An open page, for its supervisor and for readers."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.watch_part = _Part(descriptor, 0, WATCH_BYTES)
        self.description = _Part(descriptor, 2 * WATCH_BYTES, DESCRIPTION_BYTES)
        self.values = _Part(descriptor, 2 * (WATCH_BYTES + DESCRIPTION_BYTES), VALUES_BYTES)

    @classmethod
    def create(cls, nonce: str) -> Page:
        """A new page, held (by a lock) until it is closed or its process ends. Raises: OSError."""
        path = page_path(nonce)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return cls(path, descriptor)

    @classmethod
    def open(cls, path: Path) -> Page:
        """Raises: FileNotFoundError when the rank is not on this machine, or has gone."""
        return cls(path, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        os.close(self._descriptor)

    def post_watch(self, watch: Watch) -> None:
        self.watch_part.write(json.dumps(asdict(watch)).encode())

    def watch(self) -> Watch | None:
        data = self.watch_part.read()
        return Watch(**json.loads(data)) if data is not None else None

    def numbers(self) -> Iterator[tuple[Series, Sequence[float]]]:
        """Every series that the rank has written, and its numbers: one, or a histogram's counts and sum."""
        description, data = self.description.read(), self.values.read()
        if description is None or data is None or _SCHEMA.unpack_from(data)[0] != zlib.crc32(description):
            return
        values, at = array("d", data[_SCHEMA.size :]), 0
        for name, labels in json.loads(description):
            width = FAMILIES[name].width
            yield (name, tuple(labels)), values[at : at + width]
            at += width


def sweep_pages() -> None:
    """Remove pages whose supervisors were killed; those of other users are theirs to remove."""
    for path in page_folder().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # another sweeper was faster; not ours; in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - path.stat().st_mtime > FRESH_SECONDS:  # a fresh one may be about to be locked
                path.unlink()


class PageWriter:
    """A rank's numbers. Those of an earlier process of the rank are gone on with, so that counters never fall."""

    def __init__(self, path: Path, series: Sequence[Series]) -> None:
        self._page = Page.open(path)
        places = accumulate((FAMILIES[name].width for name, _ in series), initial=0)
        self._at = dict(zip(series, places, strict=False))
        description = json.dumps(series).encode()
        before = {key: list(values) for key, values in self._page.numbers()}
        self._values = array("d")
        for name, labels in series:
            fresh = [math.nan if FAMILIES[name].kind == "gauge" else 0.0] * FAMILIES[name].width
            self._values.extend(before.get((name, labels), fresh))
        self._schema = _SCHEMA.pack(zlib.crc32(description))
        self._page.description.write(description)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge; NaN: not known."""
        self._values[self._at[name, labels]] = value

    def add(self, name: str, value: float, *labels: str) -> None:
        """Count."""
        self._values[self._at[name, labels]] += value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put one value into a histogram."""
        first, buckets = self._at[name, labels], FAMILIES[name].buckets
        self._values[first + bisect_left(buckets, value)] += 1
        self._values[first + len(buckets) + 1] += value

    def publish(self) -> None:
        """Show the numbers to readers. Raises: OSError."""
        self._page.values.write(self._schema + self._values.tobytes())

    def close(self) -> None:
        self._page.close()
