"""The journal of a preparation: the shards that are finished."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from pydantic import ValidationError

from sdit.data.index import INDEX_NAME, FileRecord, read_index
from sdit.errors import ConfigError
from sdit.files import naming

JOURNAL_NAME = "progress.jsonl"
Recipe = dict[str, Any]
AnyRecord = TypeVar("AnyRecord", bound=FileRecord)
SomeRecord = TypeVar("SomeRecord", bound=FileRecord, covariant=True)
# The behaviour of versions without these keys.
UNRECORDED = {"background": None, "exif": False, "numeric_classes": False}
FREE = frozenset({"skip_bad"})  # keys that may change between two commands: finished shards are kept


class Index(Protocol[SomeRecord]):
    """What a journal needs of an index: its recipe and its records."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def shards(self) -> Sequence[SomeRecord]: ...


class Journal(Generic[AnyRecord]):
    """The journal file: one JSON object per line, first the recipe, then each finished shard.

    `finished` maps a shard's name to its record.
    """

    def __init__(self, file: BinaryIO, finished: dict[str, AnyRecord]) -> None:
        self._file = file
        self.finished = finished

    def add(self, record: AnyRecord) -> None:
        """Append the record of a finished shard and flush it to disk."""
        _append(self._file, record.model_dump_json())


@contextmanager
def opened_journal(
    folder: Path, recipe: Recipe, kind: type[AnyRecord], index: Index[AnyRecord] | None, earlier: Sequence[str] = ()
) -> Iterator[Journal[AnyRecord]]:
    """Open the folder's journal and lock it against other processes. Remove it if the block ends without an error.

    `kind` is the type of its records. `index` is the folder's index if an earlier preparation finished.
    `earlier` are fingerprints of the contents that the new recipe's content begins with.

    Raises: ConfigError: if the folder was made by another recipe, or another process writes it.
    """
    finished = {}
    if index is not None:
        _refuse_other_recipe(folder, index.recipe, recipe, earlier)
        finished = {record.name: record for record in index.shards}
    with (folder / JOURNAL_NAME).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out: {folder} is being written by another process") from None
        begun, records = _journal_content(file, recipe, kind)
        _refuse_other_recipe(folder, begun, recipe, earlier)
        yield Journal(file, finished | {record.name: record for record in records})
        (folder / JOURNAL_NAME).unlink()


def begun_recipe(folder: Path) -> Recipe | None:
    """Return the recipe that a folder was begun with, or None if it has no readable recipe."""
    if (folder / INDEX_NAME).exists():
        return read_index(folder).recipe
    try:
        with (folder / JOURNAL_NAME).open("rb") as file:
            begun = json.loads(file.readline())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return begun if isinstance(begun, dict) else None


def _journal_content(file: BinaryIO, recipe: Recipe, kind: type[AnyRecord]) -> tuple[Recipe, list[AnyRecord]]:
    """Return the journal's recipe and records. An incomplete last line is removed. An empty journal gets its first line."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    file.truncate(len(whole))
    if not whole:
        _append(file, json.dumps(recipe))
        return recipe, []
    first, *lines = whole.splitlines()
    try:
        begun, records = json.loads(first), [kind.model_validate_json(line) for line in lines]
    except (ValueError, ValidationError):
        begun, records = None, []
    if not isinstance(begun, dict):
        raise ConfigError(f"--out: {file.name} cannot be read; delete it, or choose another folder")
    return begun, records


def _refuse_other_recipe(folder: Path, found: Recipe, asked: Recipe, earlier: Sequence[str]) -> None:
    found, asked = {**UNRECORDED, **found}, {**UNRECORDED, **asked}
    if found.get("content") in earlier:
        found["content"] = asked["content"]
    differing = [key for key in sorted({*found, *asked} - FREE) if found.get(key) != asked.get(key)]
    if not differing:
        return
    # Report the most helpful key: a different source changes other keys, and most keys change the content.
    key = min(differing, key=lambda name: (name != "source", name == "content", name))
    made = f"with {key} {found.get(key)!r}, this command asks for {asked.get(key)!r}"
    if key == "content":
        made = "from other images than this command reads; it does not say which they were"
    raise ConfigError(f"--out: {folder} was made {made}; choose another folder, or delete it")


def _append(file: BinaryIO, line: str) -> None:
    with naming(Path(file.name)):
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
