"""The files in RUN/logs: those of rank 0, and one per node and kind for the other ranks, whose lines are marked by rank."""

from __future__ import annotations

import errno
import os
import re
import socket
from pathlib import Path
from typing import Literal

HOST_CHARACTERS = 64


def log_path(folder: Path, rank: int, kind: Literal["log", "stacks"]) -> Path:
    """Return `rank-000.KIND` for rank 0, and `node-HOST.KIND` for another rank of this host."""
    if rank == 0:
        return folder / f"rank-000.{kind}"
    host = re.sub(r"[^\w.-]", "-", socket.gethostname())[:HOST_CHARACTERS]
    return folder / f"node-{host}.{kind}"


def mark_lines(text: str, rank: int) -> str:
    """Return the text with `rank 3 | ` before each line. The lines of rank 0, which has its own file, are not marked."""
    return text if rank == 0 else "".join(f"rank {rank} | {line}" for line in text.splitlines(keepends=True))


def append(descriptor: int, text: str) -> None:
    """Append a text to a file that was opened with O_APPEND. One write keeps its lines together among several processes.

    Raises: OSError: if it does not fit.
    """
    data = text.encode(errors="backslashreplace")
    if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append_to(path: Path, text: str) -> None:
    """Append a text to a file, which is created if it is missing. Raises: OSError: if it cannot be written."""
    descriptor = open_to_append(path)
    try:
        append(descriptor, text)
    finally:
        os.close(descriptor)


def open_to_append(path: Path) -> int:
    """Return a descriptor for `append`. Raises: OSError: if the file cannot be opened."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
