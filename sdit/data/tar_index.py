"""tars.json: the tars of others that a run reads in place, with the checksum of each tar and the places of its samples.

A folder of this kind holds no images. `members-N.npy` holds the samples of tar N, an array of dtype MEMBER.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from sdit.data.image_file import AS_ADM, Reading
from sdit.data.index import FileRecord, StrictRecord, read_json_model
from sdit.data.journal import opened_journal
from sdit.data.names import shown
from sdit.data.pool import run_tasks
from sdit.data.record_labels import NO_LABEL, ClassNames, merged_labels
from sdit.data.records import list_archives
from sdit.data.tar_records import BY_DEFAULT, TarArchive, TarLabels, is_compressed
from sdit.errors import ConfigError, DataError
from sdit.files import replacing

TAR_INDEX_NAME = "tars.json"
MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])  # of the image's bytes in the tar
_log = logging.getLogger(__name__)


class TarRecord(FileRecord):
    """A tar at the path `name`. `members` is a sha256 of the array of its samples."""

    members: str = Field(pattern=r"^[0-9a-f]{64}$")


class TarIndex(StrictRecord):
    """The contents of tars.json. `recipe` holds what the index was made from, and how images are read."""

    version: Literal[1] = 1
    classes: int = Field(ge=0)
    class_names: ClassNames = ()
    empty_classes: tuple[int, ...] = ()
    recipe: dict[str, Any]
    shards: tuple[TarRecord, ...] = Field(min_length=1)

    @property
    def total(self) -> int:
        return sum(record.samples for record in self.shards)

    @property
    def reading(self) -> Reading:
        """How the images are converted to pixels."""
        background = self.recipe.get("background")
        return Reading(None if background is None else tuple(background), bool(self.recipe.get("exif")))

    @property
    def fingerprint(self) -> str:
        """A sha256 of the tars' checksums, their samples and labels, the classes, and how images are read."""
        content = {
            "classes": self.classes,
            "class_names": self.class_names,
            "reading": [self.recipe.get("background"), self.recipe.get("exif")],
            "shards": [(record.sha256, record.members) for record in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_tar_index(folder: Path) -> TarIndex:
    """Return the index of a folder that `sdit prepare index` wrote.

    Raises: DataError: if the folder has no index, or the index is not valid.
    """
    command = f"run: sdit prepare index TARS --out {folder}"
    return read_json_model(folder / TAR_INDEX_NAME, TarIndex, lambda: command, "index the tars again")


@dataclass(frozen=True)
class TarOptions:
    """How tars are indexed: where their `labels` are, the class names, how images are read."""

    labels: TarLabels = BY_DEFAULT
    class_names: ClassNames = ()
    reading: Reading = AS_ADM
    skip_bad: bool = False


@dataclass(frozen=True)
class TarSummary:
    """The result of `index_tars`: tars hashed now and `kept` from before, samples `skipped`, and the index."""

    hashed: int
    kept: int
    skipped: int
    index: TarIndex


def index_tars(paths: Sequence[Path], options: TarOptions, out: Path, jobs: int = 1) -> TarSummary:
    """Write an index of uncompressed tars into the folder `out`. No image is decoded or copied.

    Raises:
        ConfigError: if a tar is compressed, or `out` was made from other tars.
        DataError: if a tar cannot be read, or a sample cannot be used and `skip_bad` is False.
    """
    paths = [Path(os.path.abspath(path)) for path in paths]
    for path in paths:
        if path.is_file() and is_compressed(path):
            raise ConfigError(
                f"TAR: {shown(path)} is compressed; legal: uncompressed tars; sdit prepare webdataset reads it and "
                "writes shards"
            )
    members, names, classes, skipped = _list_members(paths, options, jobs)
    used = [number for number, each in enumerate(members) if len(each)]
    paths, members = [paths[number] for number in used], [members[number] for number in used]
    if not paths:
        raise DataError("none of the tars holds a sample that can be used")
    recipe = _recipe(paths, members, names, options)
    out.mkdir(parents=True, exist_ok=True)
    records, kept = [], 0
    before = read_tar_index(out) if (out / TAR_INDEX_NAME).exists() else None
    with opened_journal(out, recipe, TarRecord, before) as journal:
        files = [members_path(out, shard) for shard in range(len(paths))]
        tasks = zip(paths, files, members, [journal.finished.get(str(path)) for path in paths], strict=True)
        for record, is_kept in run_tasks(_hash_tar, tasks, jobs):
            records.append(record)
            kept += is_kept
            if not is_kept:
                journal.add(record)
        index = _index(paths, records, members, names, classes, recipe)
        with replacing(out / TAR_INDEX_NAME) as file:
            file.write(index.model_dump_json(indent=1).encode() + b"\n")
    return TarSummary(len(records) - kept, kept, skipped, index)


def members_path(folder: Path, shard: int) -> Path:
    """Return the file of the samples of a tar."""
    return folder / f"members-{shard:06d}.npy"


def _list_members(
    paths: Sequence[Path], options: TarOptions, jobs: int
) -> tuple[list[np.ndarray], ClassNames, int, int]:
    """Return the usable samples of each tar, the class names, the number of classes and of unusable samples."""
    listings = list_archives([TarArchive(path, options.labels) for path in paths], jobs)
    labels, names, classes = merged_labels([listing.labels for listing in listings], options.class_names)
    found, start, skipped = [], 0, 0
    for path, listing in zip(paths, listings, strict=True):
        for fault in listing.faults.values():
            if not options.skip_bad:
                raise DataError(f"{shown(path)}: {fault}; --skip-bad leaves out what cannot be read")
            _log.warning("skipped: %s: %s", shown(path), fault)
        members = np.zeros(len(listing.table), MEMBER)
        members["offset"], members["size"] = listing.table["offset"], listing.table["size"]
        members["label"] = labels[start : start + len(members)]
        start += len(members)
        is_usable = np.array([row not in listing.faults for row in listing.table["row"].tolist()], dtype=np.bool_)
        found.append(members[is_usable & (members["label"] != NO_LABEL)])
        skipped += len(members) - len(found[-1])
    return found, names, classes, skipped


def _recipe(
    paths: Sequence[Path], members: Sequence[np.ndarray], names: ClassNames, options: TarOptions
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(names).encode())
    for path, each in zip(paths, members, strict=True):
        digest.update(f"{path}\0{path.stat().st_size}\n".encode(errors="surrogateescape") + each.tobytes())
    content = {"content": digest.hexdigest(), "skip_bad": options.skip_bad}
    return {"source": "index", **options.reading.recipe, **content}


def _index(
    paths: Sequence[Path], records: Sequence[TarRecord], members: Sequence[np.ndarray], names: ClassNames, classes: int,
    recipe: dict[str, Any],
) -> TarIndex:  # fmt: skip
    record_of = {record.name: record for record in records}
    ordered = tuple(record_of[str(path)] for path in paths)
    present = {int(label) for each in members for label in np.unique(each["label"])}
    empty = tuple(label for label in range(classes) if label not in present)
    return TarIndex(classes=classes, class_names=names, empty_classes=empty, recipe=recipe, shards=ordered)


def _hash_tar(task: tuple[Path, Path, np.ndarray, TarRecord | None]) -> tuple[TarRecord, bool]:
    """Return the record of a tar, and True if it was known and the tar has the same size and checksum.

    The task holds the tar, the file of its samples, the samples, and its record if it was hashed before.
    """
    path, file_of_members, members, known = task
    with path.open("rb", buffering=0) as tar:
        sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        size = tar.tell()  # of the bytes that were hashed
    digest = members_digest(members)
    record = TarRecord(name=str(path), bytes=size, sha256=sha256, samples=len(members), members=digest)
    if record == known and file_of_members.exists():
        return record, True
    with replacing(file_of_members) as file:
        np.lib.format.write_array(file, members, version=(1, 0), allow_pickle=False)
    return record, False


def members_digest(members: np.ndarray) -> str:
    """Return a sha256 of the samples (n,) of dtype MEMBER."""
    return hashlib.sha256(members.tobytes()).hexdigest()
