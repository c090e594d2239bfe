"""Appends lines to a file. Lines that do not fit on a full disk wait in memory until they do."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)
MOST_WAITING = 10_000  # lines; a logged step has about 1 kB


class WaitingLines:
    """The lines of one file that are not on the disk yet, in order. If more than `MOST_WAITING` wait, the oldest are lost."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._lost = 0
        self._reported = False

    def append(self, path: Path, line: str) -> None:
        """Append a line after those that wait. If the disk is full, all wait, which is logged once, and the run continues."""
        self._lines.append(line + "\n")
        if len(self._lines) > MOST_WAITING:
            self._lines.popleft()
            self._lost += 1
        try:
            self._write(path)
        except FileNotFoundError:  # the run folder was deleted, and FolderWatch ends the run
            self._lines.clear()
        except OSError as error:
            if not self._reported:
                problem = f"lines wait until they can be written ({error.strerror})"
                _log.warning("%s: %s; training continues", path.name, problem)
            self._reported = True

    def keep(self, is_kept: Callable[[str], bool]) -> None:
        """Forget the waiting lines that are no longer wanted."""
        self._lines = deque(line for line in self._lines if is_kept(line))

    def close(self, path: Path) -> None:
        """Write the waiting lines, or log how many are lost."""
        if not self._lines:
            return
        try:
            self._write(path)
        except OSError as error:
            _log.warning("%s: %d lines are lost (%s)", path.name, self._lost + len(self._lines), error.strerror)
            self._lines.clear()

    def _write(self, path: Path) -> None:
        """Write all lines. A failed write leaves no part of them.

        Raises: OSError: if they do not fit.
        """
        size = None
        try:
            with path.open("ab", buffering=0) as file:
                size, data = file.seek(0, os.SEEK_END), memoryview("".join(self._lines).encode())
                while data:
                    data = data[file.write(data) or 0 :]
        except OSError:  # also of close, where network file systems report a full disk
            if size is not None:
                with suppress(OSError):  # a read-only file system has taken nothing
                    os.truncate(path, size)
            raise
        waited, lost, self._lost = len(self._lines), self._lost, 0
        self._lines.clear()
        if self._reported:
            _log.warning("%s: can be written again: %d lines had waited, %d are lost", path.name, waited - 1, lost)
            self._reported = False
