"""Files that appear whole or not at all: the one atomic writer, fsync, and free space. No torch."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write. It takes the place of `path`, on the disk and in one step, if the block ends without an error.

    Raises: OSError, which names `path`.
    """
    with replacing_path(path) as partial, naming(path), partial.open("wb") as file:
        yield file


@contextmanager
def replacing_path(path: Path, shared: bool = False) -> Iterator[Path]:
    """Do the same for a writer that takes a path: yield a hidden path in the same folder.

    The hidden name is always the same, so that a repeated command replaces what a killed one left. If several processes may
    write `path` at once (`shared`), it is unique. Then nothing is forced to storage: such files are messages.
    Raises: OSError.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield partial
        commit(partial, path, durable=not shared)
    finally:
        with suppress(OSError):  # it was committed, or never created
            partial.unlink()


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file. Raises: OSError, which names `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def commit(partial: Path, path: Path, durable: bool = True) -> None:
    """Give a complete file its final name; if `durable`, file and name survive a power cut. Raises: OSError."""
    with naming(path):
        if durable:
            fsync(partial)
        os.replace(partial, path)
        if durable:
            fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to storage. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let file system errors of the block name `path`: a full disk does not say by itself whose write failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user can still write in a file system. Raises: OSError."""
    return shutil.disk_usage(folder).free
