"""A data set in tars of others, read in place. Images are cropped and resized to model.input_size when they are read.

A tar is compared with its checksum in the index when it is opened, in pieces. Its images are then read one by one, so that
no tar is in memory as a whole.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdit.data.bad_samples import BadSample, BadShard
from sdit.data.decode import Sample
from sdit.data.image_file import Reading, decode_image
from sdit.data.index import DatasetFacts
from sdit.data.names import shown
from sdit.data.shards import patiently
from sdit.data.tar_headers import read_member
from sdit.data.tar_index import MEMBER, TarRecord, members_digest, members_path, read_tar_index
from sdit.errors import DataError


class TarsInPlace:
    """A data set of indexed tars, as square images of `size` pixels with `channels` channels."""

    def __init__(self, folder: Path, size: int, channels: int) -> None:
        self._index = read_tar_index(folder)
        self._folder = folder
        self.facts = DatasetFacts(
            kind="images", total=self._index.total, channels=channels, size=size, classes=self._index.classes,
            class_names=self._index.class_names, empty_classes=self._index.empty_classes,
        )  # fmt: skip
        self.counts = tuple(record.samples for record in self._index.shards)
        self.fingerprint = self._index.fingerprint

    def open(self, shard: int) -> OpenTar:
        record = self._index.shards[shard]
        members = self._members(shard, record)
        file = patiently(lambda: _verified(record), record.name)
        return OpenTar(file, record, members, self.facts, self._index.reading)

    def _members(self, shard: int, record: TarRecord) -> np.ndarray:
        path = members_path(self._folder, shard)
        try:
            members: np.ndarray = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise BadShard("missing", record.name, f"the index has no {path}") from None
        except (ValueError, EOFError) as error:
            raise BadShard("archive", record.name, f"{path} cannot be read: {error}") from None
        if members.dtype != MEMBER or members_digest(members) != record.members:
            raise BadShard("checksum", record.name, f"{path} does not have the sha256 of the index")
        return members


class OpenTar:
    """A verified tar. Its file stays open, so that another file in its place changes nothing."""

    decoded = None

    def __init__(
        self, file: BinaryIO, record: TarRecord, members: np.ndarray, facts: DatasetFacts, reading: Reading
    ) -> None:
        self._file, self._record, self._members, self._facts, self._reading = file, record, members, facts, reading
        self._state = _state(file)

    def __len__(self) -> int:
        return len(self._members)

    def sample(self, member: int) -> Sample:
        """Return the sample at a position of the tar, decoded, cropped and resized.

        Raises:
            BadSample: if the image cannot be used.
            BadShard: if the tar changed after it was opened.
        """
        offset, size, label = self._members[member].tolist()
        name, data = read_member(self._file.fileno(), offset, size)
        if _state(self._file) != self._state:
            raise BadShard("checksum", self._record.name, "changed while it was open")
        try:
            pixels = decode_image(data, name, self._facts.size, self._facts.channels, self._reading)
        except DataError as error:
            detail = str(error).removeprefix(f"{shown(name)}: ")
            raise BadSample("undecodable", self._record.name, shown(name), detail) from error
        return Sample(pixels, label)


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _verified(record: TarRecord) -> BinaryIO:
    """Open a tar and compare it with its record. Raises: BadShard: if it differs."""
    if not stat.S_ISREG(os.stat(record.name).st_mode):  # opening a FIFO would wait for a writer
        raise BadShard("missing", record.name, "is no regular file")
    file = open(record.name, "rb", buffering=0)  # noqa: SIM115  # the caller keeps it open
    try:
        size = os.fstat(file.fileno()).st_size
        if size != record.bytes:
            raise BadShard("size", record.name, f"has {size} bytes, the index says {record.bytes}")
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise BadShard("checksum", record.name, "does not have the sha256 of the index")
    except BaseException:
        file.close()
        raise
    return file  # type: ignore[return-value]
