"""Image records in archives that others made: tar, zip, Parquet or npz files, read as square images of one size.

An archive holds numbered records. All records are listed before the first image is decoded: 36 bytes of memory for each.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sdit import randomness
from sdit.data.image_file import AS_ADM, Reading, decode_image, square_pixels
from sdit.data.index import DatasetFacts
from sdit.data.names import shown
from sdit.data.pool import run_tasks
from sdit.data.record_labels import NO_LABEL, ClassNames, LabelColumn, merged_labels
from sdit.data.sources import SourceImage, sample_key
from sdit.errors import DataError
from sdit.randomness import Purpose

# The place of a record in its archive: its number, and for tar and zip the bytes that hold it and their CRC-32.
RECORD = np.dtype(
    [("archive", "<i4"), ("row", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("label", "<i4")]
)
# An encoded image, pixels (H, W) or (H, W, C) uint8, or the reason for neither.
Content = bytes | np.ndarray | DataError
Named = tuple[str, Content]  # with the name of the record for messages
Faults = Mapping[tuple[int, int], str]  # by archive and row: why a record cannot be used


@dataclass(frozen=True)
class Listing:
    """The records of one archive: a `table` of dtype RECORD, their labels, and the `faults` of bad records by row."""

    table: np.ndarray
    labels: LabelColumn
    faults: Mapping[int, str] = field(default_factory=dict)


def row_table(count: int) -> np.ndarray:
    """Return a table of records that their row in the archive identifies: 0..count-1."""
    table = np.zeros(count, RECORD)
    table["row"] = np.arange(count)
    return table


class Archive(Protocol):
    """A file of records. It can be pickled."""

    @property
    def path(self) -> Path: ...

    def list_records(self) -> Listing:
        """Return the records in their order. No image is decoded.

        Raises: DataError: if the file is not such an archive.
        """
        ...

    def read(self, records: np.ndarray) -> Iterator[Named]:
        """Yield the name and the content of each of the records (n,) of dtype RECORD, in order."""
        ...


@dataclass(frozen=True)
class RecordSource:
    """The images of the `records` (N,), an ImageSource. The first has position `start`. Images are cropped when read."""

    facts: DatasetFacts
    recipe: dict[str, Any]
    archives: tuple[Archive, ...]
    records: np.ndarray
    faults: Faults
    reading: Reading = AS_ADM
    start: int = 0
    listing = None

    @property
    def labels(self) -> np.ndarray:
        """The labels (n,) of the records that can be used."""
        labels: np.ndarray = self.records["label"]
        return labels[labels != NO_LABEL]

    def __len__(self) -> int:
        return len(self.records)

    def subset(self, first: int, last: int) -> RecordSource:
        chosen = self.records[first:last]
        keys = set(zip(chosen["archive"].tolist(), chosen["row"].tolist(), strict=True)) if self.faults else set()
        faults = {key: fault for key, fault in self.faults.items() if key in keys}
        return replace(self, records=chosen, faults=faults, start=self.start + first)

    def images(self) -> Iterator[SourceImage]:
        position = self.start
        # Of the records that follow one another in an archive.
        ends = np.flatnonzero(np.diff(self.records["archive"])) + 1
        for records in np.split(self.records, ends) if len(self) else ():
            number = int(records["archive"][0])
            faults = [self.faults.get((number, row), "") for row in records["row"].tolist()]
            contents = self.archives[number].read(records[[not fault for fault in faults]])
            for record, fault in zip(records, faults, strict=True):
                name, content = ("", DataError(fault)) if fault else next(contents)
                yield SourceImage(sample_key(position), self._pixels(content, name), int(record["label"]))
                position += 1

    def _pixels(self, content: Content, name: str) -> np.ndarray | DataError:
        if isinstance(content, DataError) or (isinstance(content, np.ndarray) and self.facts.kind == "latents"):
            return content
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about sizes, which are bounded, and about metadata
                if isinstance(content, bytes):
                    return decode_image(content, name, self.facts.size, self.facts.channels, self.reading)
                is_grey = content.ndim == 3 and content.shape[-1] == 1
                image = Image.fromarray(content[..., 0] if is_grey else content)
                return square_pixels(image, self.facts.size, self.facts.channels)
        except DataError as error:
            return error


@dataclass(frozen=True)
class RecordOptions:
    """How records become images. `shuffled`: in a fixed random order, for archives with random access.

    `latents`: the records are moments (O, 2C, H, W) of `size` H and `channels` C. `mirrored`: O is 2.
    """

    size: int
    channels: int = 3
    reading: Reading = AS_ADM
    class_names: ClassNames = ()
    shuffled: bool = False
    latents: bool = False
    mirrored: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that decide the images, as JSON."""
        if self.latents:
            return {"size": self.size, "channels": self.channels, "mirrored": self.mirrored}
        return {"size": self.size, "channels": self.channels, **self.reading.recipe}


def record_source(archives: Sequence[Archive], kind: str, options: RecordOptions, jobs: int = 1) -> RecordSource:
    """Return the images of archives, in the order of the archives. `kind` names the source in the recipe.

    Raises:
        DataError: if an archive cannot be read, or there is no record.
        ConfigError: if the labels do not fit the class names.
    """
    listings = list_archives(archives, jobs)
    tables: list[np.ndarray] = []
    faults: dict[tuple[int, int], str] = {}
    for number, listing in enumerate(listings):
        table = listing.table.copy()
        table["archive"] = number
        tables.append(table)
        faults |= {(number, row): f"{shown(archives[number].path)}: {text}" for row, text in listing.faults.items()}
    records = np.concatenate(tables)
    if not len(records):
        raise DataError(f"{shown(archives[0].path)}: {len(archives)} archives hold no images")
    records["label"], names, classes = merged_labels([listing.labels for listing in listings], options.class_names)
    if faults:
        keys = zip(records["archive"].tolist(), records["row"].tolist(), strict=True)
        records["label"][np.array([key in faults for key in keys])] = NO_LABEL
    facts = DatasetFacts(
        kind="latents" if options.latents else "images", total=len(records), channels=options.channels,
        size=options.size, classes=classes, class_names=names, mirrored=options.mirrored,
    )  # fmt: skip
    recipe = {"source": kind, **options.recipe, "content": _content(archives, records, names, faults)}
    if options.shuffled:
        records = records[randomness.permutation(randomness.keys(0, Purpose.PREPARATION_ORDER), len(records))]
    return RecordSource(facts, recipe, tuple(archives), records, faults, options.reading)


def list_archives(archives: Sequence[Archive], jobs: int) -> list[Listing]:
    """Return the records of each archive. `jobs` processes list them."""
    found = dict(run_tasks(_numbered, enumerate(archives), min(jobs, len(archives))))
    return [found[number] for number in range(len(archives))]


def _numbered(task: tuple[int, Archive]) -> tuple[int, Listing]:
    return task[0], task[1].list_records()


def is_sorted_by_class(records: np.ndarray) -> bool:
    """Return True if the records of each class follow one another, so that a shard holds few classes."""
    labels = records["label"]
    changes = int(np.count_nonzero(np.diff(labels)))
    return changes > 1 and changes == len(np.unique(labels)) - 1


def _content(archives: Sequence[Archive], records: np.ndarray, names: ClassNames, faults: Faults) -> str:
    """Return a fingerprint of the names and sizes of the archives, and of the places and labels of all records.

    The bytes of the images are not included because reading all archives twice takes too long.
    """
    digest = hashlib.sha256()
    for archive in archives:
        digest.update(f"{archive.path.name}\0{archive.path.stat().st_size}\n".encode(errors="surrogateescape"))
    digest.update(json.dumps([names, len(faults)]).encode() + records.tobytes())
    return digest.hexdigest()
