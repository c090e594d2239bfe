"""Standard output and standard error that never raise.

A closed pipe, a lost terminal or a full disk does not end a command.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from sdit.files import DISK_FULL

PIPE_BYTES = select.PIPE_BUF  # a pipe that poll() reports as ready accepts this many bytes without blocking
STUCK_SECONDS = 5.0  # a run no longer waits for a reader that reads nothing for this long
FULL = (*DISK_FULL, errno.EFBIG)  # after these errors a later write may succeed


def keep_output() -> None:
    """Replace sys.stdout and sys.stderr by streams that never raise. Each command calls it once, before anything else.

    A closed descriptor 0, 1 or 2 becomes /dev/null. Otherwise the next opened file would get its number.
    """
    closed = [descriptor for descriptor in range(3) if not _is_open(descriptor)]
    for descriptor in closed:
        os.open(os.devnull, os.O_RDWR)  # uses the lowest free number, which is this one
        os.set_inheritable(descriptor, True)
    sys.stdout = _stream(1, sys.stdout, is_lost=1 in closed)
    sys.stderr = _stream(2, sys.stderr, is_lost=2 in closed)


def divert_output(path: Path) -> None:
    """Append to `path`, from now on, the output that stdout and stderr do not accept. The file is created when needed."""
    for stream in (sys.stdout, sys.stderr):
        raw = _raw(stream)
        if raw is not None:
            raw.divert(path)


def output_problem() -> str:
    """Return the reason why text on standard output was lost, or an empty string.

    It is also empty if the reader closed the pipe early, as `head` does.
    """
    raw = _raw(sys.stdout)
    error = raw.error if raw is not None else None
    return "" if error is None or error.errno == errno.EPIPE else os.strerror(error.errno or 0)


class _Descriptor(io.FileIO):
    """A descriptor to write to. Data that it does not accept go to the file of `divert`, or are discarded."""

    def __init__(self, descriptor: int, is_lost: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self._is_lost, self._is_moved = is_lost, is_lost
        self._file: Path | None = None
        self._patience_seconds = STUCK_SECONDS
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, data: Any) -> int:
        """Write the first `PIPE_BYTES` of `data` and return the number of bytes. It never raises OSError."""
        chunk = bytes(memoryview(data).cast("B")[:PIPE_BYTES])
        if self._is_lost and not self._is_moved:
            self._save(chunk)
            return len(chunk)
        try:
            if self._is_ready():
                return super().write(chunk) or len(chunk)  # None: another process has filled the pipe
        except OSError as error:
            self.error = error
            self._is_lost, self._is_moved = error.errno not in FULL, False
            self._save(chunk)
        else:
            if not self.isatty():  # lines that a stopped terminal does not accept are in the log
                self._save(chunk)
        return len(chunk)

    def divert(self, path: Path) -> None:
        self._file, self._is_moved = path.absolute(), False

    def _is_ready(self) -> bool:
        """Return True if the reader accepts data.

        A run waits only once for a blocked reader. Other commands wait until it reads.
        """
        ready = bool(self._poll.poll(None if self._file is None else 1000 * self._patience_seconds))
        self._patience_seconds = STUCK_SECONDS if ready else 0.0
        return ready

    def _save(self, chunk: bytes) -> None:
        """Append to the file. A descriptor that is permanently lost is redirected to it, because C++ code also writes to it."""
        with suppress(OSError):  # no folder or no space: the text is lost
            file = os.open(self._file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if self._is_lost:
                    os.dup2(file, self.fileno())
                    self._is_moved = True
                os.write(file, chunk)
            finally:
                os.close(file)


def _stream(descriptor: int, before: TextIO | None, is_lost: bool) -> TextIO:
    """Return a text stream on a descriptor with the encoding of the previous stream. Other characters are escaped."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    errors = getattr(before, "errors", None) or "strict"
    if before is not None:
        with suppress(OSError):
            before.flush()
    raw = _Descriptor(descriptor, is_lost)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace" if errors == "strict" else errors,
        line_buffering=descriptor == 2 or raw.isatty(),
    )  # fmt: skip


def _raw(stream: TextIO | None) -> _Descriptor | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
