"""Counts operations and bytes below one folder, and gives the code under measurement a clock that the simulation moves.

The functions of `os` and `open` are replaced while a measurement runs. Each call that names a path in the folder, or uses a
descriptor of a file in it, is one operation. `open` counts two, because the file is also closed.
"""

from __future__ import annotations

import builtins
import io
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

PATH_CALLS = (
    "stat", "lstat", "listdir", "mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "utime", "access",
    "statvfs", "readlink",
)  # fmt: skip
DESCRIPTOR_CALLS = ("fstat", "fsync", "read", "pread", "write", "pwrite", "close")


@dataclass
class Counts:
    """Operations and bytes."""

    operations: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    opens: int = 0

    def add(self, other: Counts) -> None:
        self.operations += other.operations
        self.read_bytes += other.read_bytes
        self.written_bytes += other.written_bytes
        self.opens += other.opens


class CountedFolder:
    """Counts what happens below `root`, by `owner`: the rank that the simulation runs at the moment."""

    def __init__(self, root: Path) -> None:
        self._roots = (f"{root}/", f"/proc/{os.getpid()}/fd/")  # a run folder is also used through its descriptor
        self._root, self._descriptors = str(root), set[int]()
        self.owner = 0
        self._lock = Lock()  # some files are read and removed by threads
        self._counts: defaultdict[int, Counts] = defaultdict(Counts)

    def take(self) -> dict[int, Counts]:
        """Return the counts of each owner since the last call."""
        counts, self._counts = dict(self._counts), defaultdict(Counts)
        return counts

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the `with`."""
        with ExitStack() as stack:
            for name in PATH_CALLS:
                stack.enter_context(mock.patch.object(os, name, self._path_call(getattr(os, name))))
            for name in DESCRIPTOR_CALLS:
                stack.enter_context(mock.patch.object(os, name, self._descriptor_call(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "open", self._os_open(os.open)))
            stack.enter_context(mock.patch.object(os, "scandir", self._scandir(os.scandir)))
            opener = self._open(io.open)
            stack.enter_context(mock.patch.object(io, "open", opener))
            stack.enter_context(mock.patch.object(builtins, "open", opener))
            yield

    def note(self, operations: int = 0, read: int = 0, written: int = 0, opens: int = 0) -> None:
        """Count for the present owner."""
        with self._lock:
            self._counts[self.owner].add(Counts(operations, read, written, opens))

    def _is_inside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return path in self._descriptors
        text = os.fsdecode(path)
        return text.startswith(self._roots) or text == self._root

    def _path_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, **options: Any) -> Any:
            if self._is_inside(path):
                self.note(1)
            return call(path, *args, **options)

        return counted

    def _descriptor_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: Any, *args: Any) -> Any:
            result = call(descriptor, *args)
            if descriptor in self._descriptors:
                read = len(result) if name in ("read", "pread") else 0
                self.note(1, read, result if name in ("write", "pwrite") else 0)
                if name == "close":
                    self._descriptors.discard(descriptor)
            return result

        return counted

    def _os_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def counted(path: Any, *args: Any, **options: Any) -> int:
            inside = self._is_inside(path)
            if inside:
                self.note(1, opens=1)
            descriptor = call(path, *args, **options)
            if inside:
                self._descriptors.add(descriptor)
            return descriptor

        return counted

    def _open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *args: Any, **options: Any) -> Any:
            if not self._is_inside(path):
                return call(path, *args, **options)
            opens = int(not isinstance(path, int))  # a descriptor was counted when it was opened
            self.note(1 + opens, opens=opens)  # the file is also closed
            self._descriptors.discard(path)
            file = call(path, *args, **options)
            read, write = file.read, file.write

            def counted_read(*amount: Any) -> Any:
                data = read(*amount)
                self.note(1, read=len(data))
                return data

            def counted_write(data: Any) -> Any:
                self.note(1, written=memoryview(data).nbytes if not isinstance(data, str) else len(data))
                return write(data)

            file.read, file.write = counted_read, counted_write
            return file

        return counted

    def _scandir(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def counted(path: Any = ".") -> Iterator[Iterator[Any]]:
            inside = self._is_inside(path)
            self.note(int(inside))
            with call(path) as entries:
                yield (CountedEntry(entry, self) if inside else entry for entry in entries)

        return counted


class CountedEntry:
    """An entry of a folder. Its `stat` is one operation."""

    def __init__(self, entry: os.DirEntry[str], folder: CountedFolder) -> None:
        self._entry, self._folder = entry, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def __fspath__(self) -> str:
        return self._entry.path

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        self._folder.note(1)
        return self._entry.stat(follow_symlinks=follow_symlinks)


class VirtualClock:
    """Replaces `time.monotonic`, and makes `time.sleep` return at once."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Use this clock inside the `with`."""
        with mock.patch.object(time, "monotonic", lambda: self.now), mock.patch.object(time, "sleep", lambda _: None):
            yield
