"""images.jsonl: the images that a prepared folder was made from, in the order of its samples.

The first line holds the classes and the number of images of each batch. The first preparation and each addition
are one batch. Each other line is one image: name, label, bytes, time of its last change in ns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sdit.data.names import shown
from sdit.errors import ConfigError
from sdit.files import replacing

IMAGE_LIST_NAME = "images.jsonl"
ImageRow = tuple[str, int, int, int]  # name, label, bytes, time of its last change in ns
UNKNOWN = -1  # bytes and time of a file that cannot be reached, such as a broken link


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
            return f"{len(names)} {word}" + (
                f" ({shown(names[0])}{', ...' if len(names) > 1 else ''})" if names else ""
            )

        return f"{counted(self.added, 'added')}, {counted(self.gone, 'gone')}, {counted(self.changed, 'changed')}"


@dataclass(frozen=True)
class ImageList:
    """The images `files` (name, label) of `classes`, with their `sizes` in bytes and `times` in ns.

    `batches` holds the number of images of each batch.
    """

    classes: tuple[str, ...]
    files: tuple[tuple[str, int], ...]
    sizes: tuple[int, ...]
    times: tuple[int, ...]
    batches: tuple[int, ...]

    def rows(self) -> list[ImageRow]:
        """Return name, label, size and time of each image."""
        return [(*file, size, time) for file, size, time in zip(self.files, self.sizes, self.times, strict=True)]

    def contents(self) -> tuple[str, ...]:
        """Return, for each batch, a fingerprint of the names, labels and sizes up to the end of that batch.

        The bytes of the files are not included because reading all files twice takes too long.
        """
        digest = hashlib.sha256()
        rows = iter(self.rows())
        found = []
        for count in self.batches:
            for name, label, size, _ in islice(rows, count):
                digest.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
            found.append(digest.hexdigest())
        return tuple(found)

    def changes(self, now: ImageList) -> Changes:
        """Return the differences from this list to the list `now`."""
        before = {name: (size, time) for name, _, size, time in self.rows()}
        after = {name: (size, time) for name, _, size, time in now.rows()}
        both = sorted(before.keys() & after.keys())
        return Changes(
            added=sorted(after.keys() - before.keys()),
            gone=sorted(before.keys() - after.keys()),
            changed=[name for name in both if before[name][0] != after[name][0]],
            rewritten=[name for name in both if before[name][0] == after[name][0] and before[name] != after[name]],
        )


def image_list(classes: tuple[str, ...], rows: Sequence[ImageRow], batches: tuple[int, ...]) -> ImageList:
    """Return the list of the given rows, in their order."""
    return ImageList(
        classes,
        tuple((name, label) for name, label, _, _ in rows),
        tuple(size for _, _, size, _ in rows),
        tuple(time for _, _, _, time in rows),
        batches,
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
        return image_list(tuple(map(str, head["classes"])), rows, batches)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"--out: {shown(path)} cannot be read; delete it, or choose another folder") from None


def _row(values: Any) -> ImageRow:
    name, label, size, time = values
    return str(name), int(label), int(size), int(time)


def write_image_list(folder: Path, images: ImageList) -> None:
    """Write the list atomically, unless the folder already holds the same list."""
    if read_image_list(folder) == images:
        return
    with replacing(folder / IMAGE_LIST_NAME) as file:
        file.write(json.dumps({"version": 1, "classes": images.classes, "batches": images.batches}).encode() + b"\n")
        for row in images.rows():
            file.write(json.dumps(row).encode() + b"\n")
