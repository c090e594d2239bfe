"""What the supervisors of one node share in memory, so that one of them reads and writes the shared store for all.

    sdit-spec-TOKEN        the attempt spec, as in plan.json
    sdit-spec-TOKEN.beat   the beat, and when a supervisor of this node has read it
    sdit-spec-TOKEN.ends   the exit reports of the ranks of this node, a file for each attempt and rank

No supervisor has a special role. One that finds the copy too old reads the shared store and updates the copy. If it is killed
or stopped, another one does so at its next poll.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdit.files import read_json, write_json
from sdit.metrics.shared_file import shared_folder

PREFIX = "sdit-spec-"
ABANDONED_SECONDS = 600.0  # a copy that nobody updated for this long belongs to no run


@dataclass(frozen=True)
class Beat:
    """What all supervisors read again and again, in a few bytes.

    `time_ns` is when rank 0's supervisor last showed that it is alive. `version` is that of the attempt spec. `ending` and `code`
    are the fields of the attempt spec that change during an attempt.
    """

    version: int
    time_ns: int = 0
    ending: bool = False
    code: int | None = None


class NodeCopy:
    """The copy of the store with this `token`. If shared memory cannot be written, there is no copy."""

    def __init__(self, token: str) -> None:
        self._spec = shared_folder() / f"{PREFIX}{token}"
        self._beat = self._spec.with_name(f"{self._spec.name}.beat")
        self._ends = self._spec.with_name(f"{self._spec.name}.ends")
        self.is_written = False  # True if this process has written the copy

    def beat(self, max_age_seconds: float) -> Beat | None:
        """Return the beat if a supervisor of this node has read it within `max_age_seconds`, else None."""
        body = _own_json(self._beat) if max_age_seconds > 0 else None
        if body is None or not 0 <= time.monotonic() - float(body.pop("read_at")) < max_age_seconds:
            return None
        return Beat(**body)

    def spec(self, version: int) -> dict[str, Any] | None:
        """Return the attempt spec if the copy has this version, else None."""
        body = _own_json(self._spec)
        return body if body is not None and body.get("version") == version else None

    def write_beat(self, beat: Beat) -> None:
        """Write a beat that was read just now."""
        self._write(self._beat, {**asdict(beat), "read_at": time.monotonic()})

    def write_spec(self, body: dict[str, Any]) -> None:
        """Write an attempt spec that was read just now."""
        self._write(self._spec, body)

    def write_report(self, attempt: int, rank: int, body: dict[str, Any]) -> None:
        """Share the exit report of a rank. Without memory it is not shared."""
        with contextlib.suppress(OSError):
            self._ends.mkdir(exist_ok=True)
            write_json(self._end(attempt, rank), body)

    def reports(self, attempt: int, ranks: Iterable[int]) -> list[dict[str, Any]]:
        """Return the exit reports of these ranks that are shared."""
        found = (_own_json(self._end(attempt, rank)) for rank in ranks)
        return [body for body in found if body is not None]

    def _end(self, attempt: int, rank: int) -> Path:
        return self._ends / f"{attempt:04d}-{rank:05d}.json"

    def discard(self) -> None:
        """Remove the copy, so that each supervisor of this node uses the shared store itself."""
        shutil.rmtree(self._ends, ignore_errors=True)
        for path in (self._beat, self._spec):
            with contextlib.suppress(OSError):
                path.unlink()

    def _write(self, path: Path, body: dict[str, Any]) -> None:
        try:
            write_json(path, body)
            self.is_written = True
        except OSError:  # shared memory is full: each supervisor reads the shared store
            self.is_written = False


def remove_abandoned_copies() -> None:
    """Remove copies of launches whose supervisors were killed."""
    newest = time.time() - ABANDONED_SECONDS
    for path in shared_folder().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.getuid() and status.st_mtime < newest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _own_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file of this user, or None. Other users can also write to the folder."""
    try:
        is_own = path.lstat().st_uid == os.getuid()
    except OSError:
        return None
    return read_json(path) if is_own else None
