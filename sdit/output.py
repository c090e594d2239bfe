"""Standard output and standard error that outlive their reader: a closed pipe, a lost terminal or a full disk ends no command."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

PIPE_BYTES = select.PIPE_BUF  # a pipe that poll() calls ready takes this many bytes without blocking
STUCK_SECONDS = 5.0  # a reader that takes nothing for so long does not hold up a run any longer
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a later write may succeed; after any other error none will


def keep_output() -> None:
    """Replace sys.stdout and sys.stderr by streams that never raise. Called once, first, by each command's process.

    A closed descriptor 0, 1 or 2 becomes /dev/null: the next file that is opened would get its number otherwise.
    """
    closed = [descriptor for descriptor in range(3) if not _is_open(descriptor)]
    for descriptor in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        os.set_inheritable(descriptor, True)
    sys.stdout = _stream(1, sys.stdout, is_lost=1 in closed)
    sys.stderr = _stream(2, sys.stderr, is_lost=2 in closed)


def divert_output(path: Path) -> None:
    """From now on, append to `path` what standard output and standard error cannot take. The file is created when needed."""
    for stream in (sys.stdout, sys.stderr):
        raw = _raw(stream)
        if raw is not None:
            raw.divert(path)


def output_problem() -> str:
    """Why text on standard output was lost; empty if it was not, or if its reader only left early, as `head` does."""
    raw = _raw(sys.stdout)
    error = raw.error if raw is not None else None
    return "" if error is None or error.errno == errno.EPIPE else os.strerror(error.errno or 0)


class _Descriptor(io.FileIO):
    """A descriptor to write to. What it cannot take goes to the file of `divert`, or is dropped."""

    def __init__(self, descriptor: int, is_lost: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self._is_lost, self._is_moved = is_lost, is_lost
        self._file: Path | None = None
        self._patience_seconds = STUCK_SECONDS
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, data: Any) -> int:
        """Take all, or the first `PIPE_BYTES`, of `data`; return how many bytes. Never raises OSError."""
        part = bytes(memoryview(data).cast("B")[:PIPE_BYTES])
        if self._is_lost and not self._is_moved:
            self._save(part)
            return len(part)
        try:
            if self._is_ready():
                return super().write(part) or len(part)  # None: another process filled the pipe just now
        except OSError as error:
            self.error = error
            self._is_lost, self._is_moved = error.errno not in FULL, False
            self._save(part)
        else:
            if not self.isatty():  # a person who stops a terminal finds these lines in the log
                self._save(part)
        return len(part)

    def divert(self, path: Path) -> None:
        self._file, self._is_moved = path.absolute(), False

    def _is_ready(self) -> bool:
        """Whether the reader takes data. A run waits for a stuck one only once; other commands wait until it reads."""
        ready = bool(self._poll.poll(None if self._file is None else 1000 * self._patience_seconds))
        self._patience_seconds = STUCK_SECONDS if ready else 0.0
        return ready

    def _save(self, part: bytes) -> None:
        """Append to the file. A descriptor that is lost for good is pointed there: C++ code writes to it as well."""
        with suppress(OSError):  # no folder, or no room there either: the text is dropped
            file = os.open(self._file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if self._is_lost:
                    os.dup2(file, self.fileno())
                    self._is_moved = True
                os.write(file, part)
            finally:
                os.close(file)


def _stream(descriptor: int, before: TextIO | None, is_lost: bool) -> TextIO:
    """A text stream on a descriptor, with the encoding of the stream before it; characters outside of it are escaped."""
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
