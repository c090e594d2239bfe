"""Atomic file writes, small JSON files that processes exchange, fsync, locks of files, and free space. It imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

REMOVERS = 16  # threads that open or remove many small files
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the quota of a user, group or project


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write. If the block ends without an error, the file replaces `path` atomically and durably.

    Raises: OSError: if it cannot be written. The error names `path`.
    """
    with replacing_path(path) as partial, naming(path), partial.open("wb") as file:
        yield file


@contextmanager
def replacing_path(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a hidden path in the same folder, for a writer that needs a path. It then replaces `path` as in `replacing`.

    The hidden name is constant, so a repeated command overwrites the file of a killed one. If several processes may write
    `path` at the same time (`shared`), the name is unique and nothing is forced to storage.

    Raises: OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield partial
        commit(partial, path, durable=not shared)
    finally:
        with suppress(OSError):  # it was committed, or never created
            partial.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill. If the block ends without an error, it becomes `path` atomically and durably.

    Raises: OSError: if it cannot be written. FileExistsError: if `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "already exists; legal: a new or an empty folder", str(path))
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        partial.mkdir(parents=True)
        yield partial
        commit(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a small text file atomically. Raises: OSError: if it cannot be written. The error names `path`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Replace the file atomically: a reader never sees an incomplete one. Several processes may do so at the same time.

    Raises: OSError: if it cannot be written.
    """
    with replacing_path(path, shared=True) as partial:
        partial.write_text(json.dumps(body) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None if the file does not exist or is not a JSON object."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def commit(partial: Path, path: Path, durable: bool = True) -> None:
    """Rename a complete file to its final name. If `durable`, file and name survive a power failure.

    Raises: OSError: if the file system fails.
    """
    with naming(path):
        if durable:
            fsync(partial)
        os.replace(partial, path)
        if durable:
            fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to storage. Raises: OSError: if the file system fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to file system errors of the block, because some of them, such as a full disk, name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder that may hold thousands of files. What cannot be removed stays.

    Threads unlink the files, because a shared file system takes about a millisecond for each.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        remove_files([entry.path for entry in entries if not entry.is_dir(follow_symlinks=False)])
    shutil.rmtree(folder, ignore_errors=True)


def remove_files(paths: Sequence[str]) -> None:
    """Remove many files with several threads. Raises: OSError: if one cannot be removed."""
    with ThreadPoolExecutor(REMOVERS) as pool:
        list(pool.map(_unlink_all, (paths[first::REMOVERS] for first in range(REMOVERS))))


def _unlink_all(paths: Sequence[str]) -> None:
    for path in paths:
        os.unlink(path)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing. Other processes of this machine that want it wait."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user can still write in a file system.

    Raises: OSError: if the folder does not exist.
    """
    return shutil.disk_usage(folder).free
