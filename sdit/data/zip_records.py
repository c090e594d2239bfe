"""The records of a zip file of images with labels in dataset.json, as StyleGAN, ADM and EDM read them.

Source: NVlabs/edm, dataset_tool.py: images at any path, and dataset.json with {"labels": [[path, class], ...] or null}.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdit.data.image_file import FILE_FORMATS
from sdit.data.names import shown
from sdit.data.record_labels import as_label, label_column, odd_labels
from sdit.data.records import RECORD, Listing, Named
from sdit.data.shards import MAX_MEMBER_BYTES
from sdit.errors import DataError

LABELS_NAME = "dataset.json"
MAX_LABELS_BYTES = 2**30
METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
_ENCRYPTED = 1
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, CRC, two sizes, two lengths


class LocalHeader(NamedTuple):
    """The header before the bytes of a zip member: its name, its compression method, and the header's length in bytes."""

    name: str
    method: int
    length: int


def read_local_header(descriptor: int, offset: int) -> LocalHeader | None:
    """Return the header at a position of a zip file. Return None if there is none."""
    data = os.pread(descriptor, _LOCAL_HEADER.size, offset)
    if len(data) < _LOCAL_HEADER.size or not data.startswith(b"PK\x03\x04"):
        return None
    _, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack(data)
    name = os.pread(descriptor, name_length, offset + _LOCAL_HEADER.size)
    length = _LOCAL_HEADER.size + name_length + extra_length
    return LocalHeader(name.decode("utf-8", "backslashreplace"), method, length)


@dataclass(frozen=True)
class ZipArchive:
    """A zip file of images. Without labels in dataset.json, or if `unlabelled`, the images have none."""

    path: Path
    unlabelled: bool = False

    def list_records(self) -> Listing:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [each for each in archive.infolist() if _is_image(each.filename)]
                labels = None if self.unlabelled else self._labels(archive)
        except FileNotFoundError:
            raise DataError(f"{shown(self.path)}: no such file; legal: a zip file") from None
        except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
            raise DataError(f"{shown(self.path)}: cannot be read as a zip file: {error}") from None
        members.sort(key=lambda each: each.filename)
        table = np.zeros(len(members), RECORD)
        faults: dict[int, str] = {}
        values: list[int | str | None] = []
        for row, each in enumerate(members):
            table[row] = (0, row, each.header_offset, each.compress_size, each.CRC, 0)
            values.append(None if labels is None else as_label(labels.get(each.filename)))
            fault = _fault(each)
            if not fault and labels is not None and values[-1] is None:
                fault = f"has no class number in {LABELS_NAME}"
            if fault:
                faults[row] = f"{shown(each.filename)}: {fault}"
        for row, reason in odd_labels(values).items():
            faults.setdefault(row, f"{shown(members[row].filename)}: {reason}")
        return Listing(table, label_column(values, self.path, has_labels=labels is not None), faults)

    def _labels(self, archive: zipfile.ZipFile) -> dict[str, Any] | None:
        """Return the label of each path. Return None if dataset.json is missing or states no labels.

        Raises: DataError: if dataset.json cannot be used.
        """
        if LABELS_NAME not in archive.namelist():
            return None
        where = f"{shown(self.path)}: {LABELS_NAME}"
        if archive.getinfo(LABELS_NAME).file_size > MAX_LABELS_BYTES:
            raise DataError(f"{where}: has more than {MAX_LABELS_BYTES} bytes")
        try:
            labels = json.loads(archive.read(LABELS_NAME))["labels"]
            pairs = labels.items() if isinstance(labels, dict) else labels
            return None if labels is None else {str(name).replace("\\", "/"): label for name, label in pairs}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'{where}: cannot be read; legal: {{"labels": [[path, class], ...]}}') from None

    def read(self, records: np.ndarray) -> Iterator[Named]:
        with self.path.open("rb") as file:
            for record in records:
                yield self._read_one(file.fileno(), record)

    def _read_one(self, descriptor: int, record: np.void) -> Named:
        offset, size = int(record["offset"]), int(record["size"])
        header = read_local_header(descriptor, offset)
        if header is None:
            name = f"{self.path}: byte {offset}"
            return name, DataError(f"{shown(name)}: changed since it was listed")
        name = f"{self.path}: {header.name}"
        data: bytes | None = os.pread(descriptor, size, offset + header.length)
        if header.method == zipfile.ZIP_DEFLATED:
            data = _inflated(data or b"")
        if data is None or zlib.crc32(data) != int(record["crc"]):
            return name, DataError(f"{shown(name)}: does not have the CRC-32 of the zip file's directory")
        return name, data


def _inflated(data: bytes) -> bytes | None:
    """Return the unpacked bytes. Return None if they cannot be unpacked or are too many."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(data, MAX_MEMBER_BYTES + 1)
    except zlib.error:
        return None
    return unpacked if len(unpacked) <= MAX_MEMBER_BYTES else None


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in FILE_FORMATS and "." in base


def _fault(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in METHODS:
        return f"has the compression method {member.compress_type}; legal: {', '.join(METHODS.values())}"
    if max(member.file_size, member.compress_size) > MAX_MEMBER_BYTES:
        return f"has {member.file_size} bytes; legal: up to {MAX_MEMBER_BYTES}"
    return ""
