"""Reads files that other users may have written: regular files only, and JSON of limited size and depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from sdit.errors import CheckpointError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


class NotRegularFile(OSError):
    """An error for a folder, FIFO, device or socket in the place of a file. `strerror` names the kind."""


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file or of a link to one.

    Raises:
        NotRegularFile: if the path is something else.
        OSError: if it cannot be read.
    """
    problem = _kind_problem(path, follow_links=True)
    if problem:
        raise NotRegularFile(errno.EINVAL, problem, str(path))
    return path.read_bytes()


def open_regular(path: Path, follow_links: bool = True) -> BufferedReader:
    """Open a regular file for reading. The caller closes it.

    A FIFO or a device is refused before it is opened, because reading could hang.

    Raises:
        CheckpointError: if the path is not a regular file.
        OSError: if it cannot be opened.
    """
    problem = _kind_problem(path, follow_links)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return path.open("rb")


def _kind_problem(path: Path, follow_links: bool) -> str:
    """Return the reason why a path is not a regular file, or an empty string if it is one.

    Raises: OSError: if the path does not exist.
    """
    mode = os.stat(path, follow_symlinks=follow_links).st_mode
    return "" if stat.S_ISREG(mode) else f"is {KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file"


def read_bytes(file: BufferedReader, path: Path, most: int) -> bytes:
    """Return the remaining bytes of a file.

    Raises: CheckpointError: if the file has more than `most` bytes. It is then not read.
    """
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise CheckpointError(f"{path}: has {size} bytes; legal: at most {most}")
    return file.read()


def parse_json(data: bytes | str, source: str, what: str, depth: int) -> Any:
    """Return the value of a JSON text whose nesting is at most `depth`. `source` and `what` name it in errors.

    Raises: CheckpointError: if it is not JSON, an object has a key twice, or it is nested more deeply.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{source}: is nested too deeply for {what}; legal: {depth} levels") from None
    except _DuplicateKey as error:
        raise CheckpointError(f"{source}: {error}") from None
    except ValueError:
        raise CheckpointError(f"{source}: is incomplete or not {what}") from None
    level = [value]
    for _ in range(depth + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise CheckpointError(f"{source}: is nested too deeply for {what}; legal: {depth} levels")


class _DuplicateKey(ValueError):
    """An error for an object that has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKey(f"has the key {twice[:80]!r} twice")
    return values


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
