"""A folder of images with one subfolder per class, read as square images of one size."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdit import randomness
from sdit.data.image_file import AS_ADM, FILE_ERRORS, FILE_FORMATS, Reading, read_image
from sdit.data.image_list import UNKNOWN, Changes, ImageList, ImageRow, read_image_list
from sdit.data.index import DatasetFacts
from sdit.data.journal import begun_recipe
from sdit.data.names import shown
from sdit.data.sources import SourceImage, sample_key
from sdit.data.tree import ImageTree, listed, read_tree, refuse_empty_classes, refuse_splits
from sdit.errors import ConfigError, DataError
from sdit.randomness import Purpose

_log = logging.getLogger(__name__)
FIRST_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # the suffixes that versions without a list of images read


@dataclass(frozen=True)
class FolderSource:
    """The images `rows` under `root`. The first has position `start`. Images are cropped when read.

    `listing` holds all images. It is None in a subset, which is sent to another process.
    """

    facts: DatasetFacts
    recipe: dict[str, Any]
    root: Path
    rows: tuple[ImageRow, ...]
    reading: Reading = AS_ADM
    listing: ImageList | None = None
    start: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> list[tuple[str, int]]:
        """The path under `root` and the label of each image."""
        return [(row.name, row.label) for row in self.rows]

    def subset(self, first: int, last: int) -> FolderSource:
        return replace(self, rows=self.rows[first:last], listing=None, start=self.start + first)

    def with_list(self, images: ImageList) -> FolderSource:
        """Return the images of a list, in its order."""
        return replace(self, recipe={**self.recipe, "content": images.contents()[-1]}, rows=images.rows, listing=images)

    @property
    def labels(self) -> list[int]:
        return [row.label for row in self.rows]

    def images(self) -> Iterator[SourceImage]:
        for position, row in enumerate(self.rows, self.start):
            yield SourceImage(sample_key(position), self._pixels(row), row.label)

    def _pixels(self, row: ImageRow) -> np.ndarray | DataError:
        path = self.root / row.name
        try:
            return read_image(path, self.facts.size, self.facts.channels, self.reading)
        except DataError as error:
            if row.size != UNKNOWN and not os.path.exists(path):
                gone = "No such file or directory; it was there when the folder was listed"
                raise FileNotFoundError(errno.ENOENT, gone, shown(path)) from None
            return error


def folder_source(root: Path, size: int, channels: int) -> FolderSource:
    """Return all images under `root`, see `folder_of_tree`.

    Raises:
        DataError: if `root` holds splits instead of classes, or a class has no images.
        OSError: if the file system fails.
    """
    tree = read_tree(root)
    refuse_splits(tree)
    source = folder_of_tree(tree, size, channels)
    refuse_empty_classes(tree)
    return source


def folder_of_tree(
    tree: ImageTree, size: int, channels: int, reading: Reading = AS_ADM, numeric: bool = False
) -> FolderSource:
    """Return all images of a tree. They are unlabelled if the tree has no classes.

    The sorted list is shuffled once with a fixed key. Each shard then holds all classes, which matters because a batch
    takes samples of only a few shards.

    Raises:
        DataError: if the tree holds no images.
        OSError: if the file system fails.
    """
    files = tree.labelled()
    if not files:
        raise DataError(f"{shown(tree.root)}: holds no images; legal suffixes: {', '.join(FILE_FORMATS)}")
    names = tree.class_names
    facts = DatasetFacts(
        kind="images", total=len(files), channels=channels, size=size, classes=len(names), class_names=names
    )
    recipe = {"source": "folder", "size": size, "channels": channels, **reading.recipe, "numeric_classes": numeric}
    rows = [ImageRow(name, label, *_size_and_time(tree.root / name)) for name, label in files]
    return FolderSource(facts, recipe, tree.root, (), reading).with_list(_shuffled(names, rows, batch=0))


def continued(source: FolderSource, out: Path, add_images: bool) -> FolderSource:
    """Return the source in the order in which preparation of `out` began.

    If `add_images` is True, images that `out` does not hold are appended.

    Raises: ConfigError: if `out` was made from other images.
    """
    now = source.listing
    assert now is not None
    before = read_image_list(out) or _first_list(now, out)
    if before is None:
        return source
    changes = before.changes(now)
    if changes:
        _refuse_changes(source, out, before, changes, add_images)
        added = set(changes.added)
        batch = _shuffled(now.classes, [row for row in now.rows if row.name in added], len(before.batches))
        images = ImageList(now.classes, before.rows + batch.rows, before.batches + batch.batches)
    else:
        _refuse_other_labels(out, before, now)
        images = replace(before, classes=now.classes)
    if changes.rewritten:
        _log.warning(
            "%d images have the same size in bytes as before, but another time (%s); their prepared samples are kept; "
            "if their content changed, choose another folder for --out",
            len(changes.rewritten),
            listed(changes.rewritten),
        )
    return source.with_list(images)


def _refuse_changes(source: FolderSource, out: Path, before: ImageList, changes: Changes, add_images: bool) -> None:
    now = source.listing
    assert now is not None
    where = f"--out: {shown(out)} was made from other images than {shown(source.root)} holds now: {changes}"
    if changes.gone or changes.changed:
        raise ConfigError(f"{where}; choose another folder, or delete it (images can only be added)")
    if now.classes[: len(before.classes)] != before.classes:
        new = [name for name in now.classes if name not in before.classes]
        raise ConfigError(
            f"{where}; the new classes ({listed(new)}) would change the labels of others; choose another folder"
        )
    if not add_images:
        raise ConfigError(f"{where}; --add-images appends them in new shards; or choose another folder")


def _refuse_other_labels(out: Path, before: ImageList, now: ImageList) -> None:
    labels = {row.name: row.label for row in now.rows}
    for row in before.rows:
        if labels[row.name] != row.label:
            raise ConfigError(
                f"--out: {shown(out)} was made with other labels: {shown(row.name)} has label {row.label} there, and "
                f"{labels[row.name]} now; choose another folder, or delete it"
            )


def _first_list(now: ImageList, out: Path) -> ImageList | None:
    """Return the list of images that a version without lists read, if `out` was begun from them."""
    begun = begun_recipe(out)
    if begun is None or begun.get("content") in now.contents():
        return None
    rows = [row for row in now.rows if os.path.splitext(row.name)[1].lower() in FIRST_ENDINGS]
    first = _shuffled(now.classes, rows, batch=0)
    return first if begun.get("content") in first.contents() else None


def _shuffled(classes: tuple[str, ...], rows: list[ImageRow], batch: int) -> ImageList:
    """Return the list of one batch, sorted by label and name, then shuffled with a key made of the batch's number."""
    ordered = sorted(rows, key=lambda row: (row.label, row.name))
    order = randomness.permutation(randomness.keys(batch, Purpose.PREPARATION_ORDER), len(rows))
    return ImageList(classes, tuple(ordered[position] for position in order), (len(rows),))


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in FILE_ERRORS:
            return UNKNOWN, UNKNOWN
        raise
    return status.st_size, status.st_mtime_ns
