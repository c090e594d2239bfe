"""images.jsonl: the images that a prepared folder was made from, in the order of its samples.

The first line holds the classes and the number of images of each batch. The first preparation and each addition
are one batch. Each other line is one image: name, label, bytes, time of its last change in ns.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sdit.data.names import shown
from sdit.errors import ConfigError
from sdit.files import replacing

IMAGE_LIST_NAME = "images.jsonl"
UNKNOWN = -1  # bytes and time of a file that cannot be reached, such as a broken link


class ImageRow(NamedTuple):
    """One image: its path under the root, its label, its size in bytes and the time of its last change in ns."""

    name: str
    label: int
    size: int
    time: int


@dataclass(frozen=True)
class Changes:
    """Names of images that were added, are gone, or have another size in bytes.

    `rewritten` images have the same size but another time: they were copied, or their content changed.
    """

    added: list[str]
    gone: list[str]
    changed: list[str]
    rewritten: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.gone or self.changed)

    def __str__(self) -> str:
        def counted(names: list[str], word: str) -> str:
            first = f" ({shown(names[0])}{', ...' if len(names) > 1 else ''})" if names else ""
            return f"{len(names)} {word}{first}"

        return f"{counted(self.added, 'added')}, {counted(self.gone, 'gone')}, {counted(self.changed, 'changed')}"


@dataclass(frozen=True)
class ImageList:
    """The images `rows` of `classes`. `batches` holds the number of images of each batch."""

    classes: tuple[str, ...]
    rows: tuple[ImageRow, ...]
    batches: tuple[int, ...]

    def contents(self) -> tuple[str, ...]:
        """Return, for each batch, a fingerprint of the names, labels and sizes up to the end of that batch.

        The bytes of the files are not included because reading all files twice takes too long.
        """
        digest = hashlib.sha256()
        rows = iter(self.rows)
        found = []
        for count in self.batches:
            for name, label, size, _ in islice(rows, count):
                digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
            found.append(digest.hexdigest())
        return tuple(found)

    def changes(self, now: ImageList) -> Changes:
        """Return the differences from this list to the list `now`."""
        before, after = ({row.name: row for row in each.rows} for each in (self, now))
        both = [(before[name], after[name]) for name in sorted(before.keys() & after.keys())]
        return Changes(
            added=sorted(after.keys() - before.keys()),
            gone=sorted(before.keys() - after.keys()),
            changed=[old.name for old, new in both if old.size != new.size],
            rewritten=[old.name for old, new in both if old.size == new.size and old.time != new.time],
        )


def read_image_list(folder: Path) -> ImageList | None:
    """Return the images that a folder was made from, or None if the folder has no list.

    Raises: ConfigError: if the list cannot be read.
    """
    path = folder / IMAGE_LIST_NAME
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            rows = [_row(json.loads(line)) for line in file]
        batches = tuple(map(int, head["batches"]))
        if sum(batches) != len(rows):
            raise ValueError("its batches do not add up")
        return ImageList(tuple(map(str, head["classes"])), tuple(rows), batches)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"--out: {shown(path)} cannot be read; delete it, or choose another folder") from None


def _row(values: Any) -> ImageRow:
    name, label, size, time = values
    return ImageRow(str(name), int(label), int(size), int(time))


def write_image_list(folder: Path, images: ImageList) -> None:
    """Write the list atomically, unless the folder already holds the same list."""
    if read_image_list(folder) == images:
        return
    with replacing(folder / IMAGE_LIST_NAME) as file:
        file.write(json.dumps({"version": 1, "classes": images.classes, "batches": images.batches}).encode() + b"\n")
        for row in images.rows:
            file.write(json.dumps(row).encode() + b"\n")
