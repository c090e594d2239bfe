"""The files of a checkpoint: shards, their checksums, and the manifest. No code from a file is executed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from sdit.checked_files import open_regular, parse_json, read_bytes
from sdit.checkpoint.index import Shape, ShardTable
from sdit.checkpoint.manifest import check_manifest
from sdit.errors import CheckpointError
from sdit.files import fsync
from sdit.safetensors_file import Header, TensorEntry, encode_header, is_sizes, parse_header, stream_tensors

FORMAT = 1  # each shard has a file of its own
NODE_FORMAT = 2  # the shards of a node share a file
FORMATS = (FORMAT, NODE_FORMAT)
MANIFEST = "manifest.json"
SHARED_SUFFIX = ".shards"
MAX_MANIFEST_BYTES = 1 << 26
MANIFEST_DEPTH = 16  # checksum and body, then the sections and lists of a config
SHAPES_DEPTH = 2  # shapes by name
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardRecord:
    """One shard: the bytes [start, start + size_bytes) of the file `name`, and their xxh3-128 checksum.

    A shard has a file of its own, or the shards of a node share one of `file_bytes`.
    """

    name: str
    size_bytes: int
    xxh3: str
    start: int
    file_bytes: int

    @property
    def end(self) -> int:
        return self.start + self.size_bytes

    @property
    def is_shared(self) -> bool:
        """Return True if the shards of a node share the file."""
        return self.name.endswith(SHARED_SUFFIX)

    def to_json(self) -> dict[str, Any]:
        """Return the fields in a manifest. Those of format 1 have no `start` and no `file_bytes`."""
        fields = dict(vars(self))
        if not self.is_shared:
            del fields["start"], fields["file_bytes"]
        return fields

    def where(self, folder: Path) -> str:
        """Return the file, and the range of a shard that shares it, for errors."""
        shared = f": bytes {self.start}..{self.end}" if self.is_shared else ""
        return f"{folder / self.name}{shared}"


@dataclass(frozen=True)
class ShardPlace:
    """The bytes that one rank writes: from `start` of the file `name`, which will have `file_bytes`."""

    name: str
    start: int
    file_bytes: int


def shard_header(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape]) -> bytes:
    """Return the bytes of a shard before its first tensor."""
    return encode_header([_entry(key, flat) for key, flat in tensors.items()], _metadata(shapes))


def shard_size(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape]) -> int:
    """Return the bytes of a shard, 0 if it holds nothing."""
    return len(shard_header(tensors, shapes)) + sum(flat.nbytes for flat in tensors.values()) if tensors else 0


def shard_table(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], start: int) -> ShardTable:
    """Return what a shard at byte `start` of its file holds."""
    offset = start + len(shard_header(tensors, shapes))
    ranges = {}
    for key, flat in tensors.items():
        ranges[key] = (offset, flat.size)
        offset += flat.nbytes
    return ShardTable(ranges, shapes)


def write_shard(
    folder: Path, name: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Shape],
    place: ShardPlace | None = None,
) -> ShardRecord:  # fmt: skip
    """Write flat float32 ranges by key, with the logical shapes, as a safetensors image, and fsync the file.

    Without a `place` the file holds this shard only. With a place other ranks write the other bytes of the file.

    Raises: OSError: if the file cannot be written.
    """
    place = place or ShardPlace(name, 0, shard_size(tensors, shapes))
    digest = xxhash.xxh3_128()
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "wb") as file:
        os.ftruncate(descriptor, place.file_bytes)  # a killed writer may have left more
        file.seek(place.start)

        def write(chunk: bytes | memoryview) -> None:
            digest.update(chunk)
            file.write(chunk)

        entries = [_entry(key, flat) for key, flat in tensors.items()]
        size_bytes = stream_tensors(entries, _metadata(shapes), write)
        file.flush()
        os.fsync(file.fileno())
    return ShardRecord(name, size_bytes, digest.hexdigest(), place.start, place.file_bytes)


def _metadata(shapes: Mapping[str, Shape]) -> dict[str, str]:
    return {"shapes": json.dumps({key: list(shape) for key, shape in shapes.items()})}


def _entry(key: str, flat: np.ndarray) -> TensorEntry:
    assert flat.dtype == np.float32 and flat.ndim == 1, key
    return TensorEntry(key, "F32", flat.shape, lambda: [np.ascontiguousarray(flat, dtype="<f4").data.cast("B")])


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest together with its checksum, so that an incomplete manifest is detected."""
    text = json.dumps(body, indent=1, sort_keys=True)
    seal = hashlib.sha256(text.encode()).hexdigest()
    path = folder / MANIFEST
    path.write_text(f'{{"body": {text},\n "sha256": "{seal}"}}\n', encoding="utf-8")
    fsync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the body of the manifest.

    Raises: CheckpointError: if the manifest is missing, incomplete, of another format, or fails `check_manifest`.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path, follow_links=False) as file:
            sealed = parse_json(read_bytes(file, path, MAX_MANIFEST_BYTES), str(path), "a manifest", MANIFEST_DEPTH)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    body = sealed.get("body") if isinstance(sealed, dict) else None
    if not isinstance(body, dict):
        raise CheckpointError(f"{path}: is incomplete or not a manifest")
    text = json.dumps(body, indent=1, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise CheckpointError(f"{path}: does not match its checksum")
    if body.get("format") not in FORMATS:
        legal = ", ".join(map(str, FORMATS))
        raise CheckpointError(f"{path}: format {body.get('format')!r:.100} is not known; legal: {legal}")
    return check_manifest(body, path)


def verify_shard(folder: Path, record: ShardRecord, expected: ShardTable | None = None) -> None:
    """Read a shard once and compare it with its record, and its header with what the index says of it.

    Raises: CheckpointError: if the file is missing or not a regular file, if its size, checksum or header is wrong, or if
        a tensor holds NaN or infinite numbers. The message names the file, and the bytes of a shard that shares it.
    """
    where = record.where(folder)
    try:
        with open_regular(folder / record.name, follow_links=False) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.file_bytes:
                raise CheckpointError(f"{where}: the file has {size} bytes, the manifest says {record.file_bytes}")
            digest, is_finite = _scan(file, record)
            if digest != record.xxh3:
                raise CheckpointError(f"{where}: does not match its checksum")
            header, table = _parse_shard(file, folder / record.name, record)
            if expected is not None and not _agree(table, expected):
                raise CheckpointError(f"{where}: its header differs from the index of the manifest")
            if not is_finite or any(tensor.start % 4 for tensor in header.tensors.values()):
                _name_non_finite(file, folder / record.name, header)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from error


def _agree(stored: ShardTable, expected: ShardTable) -> bool:
    """Return True if a shard has the ranges of the index, of tensors with these shapes."""
    shapes = {name: stored.shapes.get(name) for name in expected.shapes}
    return stored.ranges == expected.ranges and shapes == expected.shapes


def _scan(file: BinaryIO, record: ShardRecord) -> tuple[str, bool]:
    """Return the xxh3-128 of a shard, and True if all its float32 words are finite.

    isfinite reads 30 GB/s, xxh3 35 GB/s.
    """
    digest, is_finite, left = xxhash.xxh3_128(), True, record.size_bytes
    file.seek(record.start)
    while left and (chunk := file.read(min(left, HASH_CHUNK_BYTES))):
        digest.update(chunk)
        words = np.frombuffer(chunk, dtype="<f4", count=len(chunk) // 4)
        is_finite = is_finite and bool(np.isfinite(words).all())
        left -= len(chunk)
    return digest.hexdigest(), is_finite


def _name_non_finite(file: BinaryIO, path: Path, header: Header) -> None:
    """Raise an error that names the first tensor with NaN or infinite numbers, if the shard has one.

    Raises: CheckpointError: if a tensor of the shard is not finite.
    """
    for key, tensor in header.tensors.items():
        count = (tensor.end - tensor.start) // 4
        if count and not np.isfinite(np.memmap(file, "<f4", "r", tensor.start, (count,))).all():
            raise CheckpointError(f"{path}: {key.rpartition('@')[0]} holds NaN or infinite numbers")


def read_shard_table(folder: Path, record: ShardRecord) -> ShardTable:
    """Return what a shard holds, from its header.

    Raises: CheckpointError: if it is not a safetensors image, or if it holds anything but flat float32 ranges that are
        inside the tensors that they name.
    """
    path = folder / record.name
    try:
        with open_regular(path, follow_links=False) as file:
            return _parse_shard(file, path, record)[1]
    except OSError as error:
        raise CheckpointError(f"{record.where(folder)}: cannot be read ({error.strerror})") from error


def _parse_shard(file: BinaryIO, path: Path, record: ShardRecord) -> tuple[Header, ShardTable]:
    """Return the header of a shard, and what it says the shard holds."""
    size = min(record.size_bytes, os.fstat(file.fileno()).st_size - record.start)
    header = parse_header(file, path, record.start, size)
    text = header.metadata.get("shapes", "{}")
    shapes = parse_json(text, f"{path}: shapes", "a mapping of names to shapes", SHAPES_DEPTH)
    if not isinstance(shapes, dict) or not all(map(is_sizes, shapes.values())):
        raise CheckpointError(f"{path}: shapes is not a mapping of names to shapes")
    for key, stored in header.tensors.items():
        name, _, start = key.rpartition("@")
        if stored.dtype != "F32" or len(stored.shape) != 1 or not re.fullmatch(r"[0-9]{1,18}", start):
            raise CheckpointError(f"{path}: {key[:100]!r} is not a flat float32 range NAME@START")
        if name in shapes and int(start) + stored.shape[0] > math.prod(shapes[name]):
            raise CheckpointError(f"{path}: {key[:100]!r} is not inside a tensor of shape {tuple(shapes[name])}")
    ranges = {key: (stored.start, stored.shape[0]) for key, stored in header.tensors.items()}
    return header, ShardTable(ranges, {name: tuple(shape) for name, shape in shapes.items()})


def manifest_shards(body: Mapping[str, Any]) -> list[ShardRecord]:
    """Return the records of the shards that a manifest lists."""
    return [
        ShardRecord(f["name"], f["size_bytes"], f["xxh3"], f.get("start") or 0, f.get("file_bytes") or f["size_bytes"])
        for f in body["files"]
    ]
