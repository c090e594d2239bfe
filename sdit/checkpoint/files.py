"""The files of a checkpoint: shards, their checksums, and the manifest. No code from a file is executed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdit.checked_files import open_regular, parse_json, read_bytes
from sdit.checkpoint.manifest import check_manifest
from sdit.errors import CheckpointError
from sdit.files import fsync
from sdit.safetensors_file import Header, TensorEntry, read_header, stream_tensors

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 24
MANIFEST_DEPTH = 16  # checksum and body, then the sections and lists of a config
SHAPES_DEPTH = 2  # shapes by name
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Name, size in bytes and xxh3-128 checksum of one shard file."""

    name: str
    size_bytes: int
    xxh3: str


def write_shard(
    folder: Path, name: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> FileRecord:
    """Write flat float32 ranges by key, with the logical shapes, as a safetensors file, and fsync it.

    Raises: OSError: if the file cannot be written.
    """
    metadata = {"shapes": json.dumps({key: list(shape) for key, shape in shapes.items()})}
    entries = [_entry(key, flat) for key, flat in tensors.items()]
    digest = xxhash.xxh3_128()
    with (folder / name).open("wb") as file:

        def write(chunk: bytes | memoryview) -> None:
            digest.update(chunk)
            file.write(chunk)

        size_bytes = stream_tensors(entries, metadata, write)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name, size_bytes, digest.hexdigest())


def _entry(key: str, flat: np.ndarray) -> TensorEntry:
    assert flat.dtype == np.float32 and flat.ndim == 1, key
    return TensorEntry(key, "F32", flat.shape, lambda: [np.ascontiguousarray(flat, dtype="<f4").data.cast("B")])


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest together with its checksum, so that an incomplete manifest is detected."""
    text = json.dumps(body, indent=1, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    path = folder / MANIFEST
    path.write_text(json.dumps(sealed, indent=1, sort_keys=True), encoding="utf-8")
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
    if not isinstance(sealed, dict) or "body" not in sealed:
        raise CheckpointError(f"{path}: is incomplete or not a manifest")
    text = json.dumps(sealed["body"], indent=1, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise CheckpointError(f"{path}: does not match its checksum")
    body = sealed["body"]
    if isinstance(body, dict) and body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {body.get('format')!r:.100} is not known; legal: {FORMAT}")
    return check_manifest(body, path)


def verify_file(folder: Path, record: FileRecord) -> None:
    """Read a shard file once and compare it with its record.

    Raises: CheckpointError: if the file is missing or not a regular file, if its size, checksum or header is wrong, or if
        a tensor holds NaN or infinite numbers. The message names the file.
    """
    path = folder / record.name
    try:
        with open_regular(path, follow_links=False) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size_bytes:
                raise CheckpointError(f"{path}: has {size} bytes, the manifest says {record.size_bytes}")
            digest, is_finite = _scan(file)
        if digest != record.xxh3:
            raise CheckpointError(f"{path}: does not match its checksum")
        header, _ = read_shard_header(path)
        starts = [tensor.start for tensor in header.tensors.values()]
        if not is_finite or any(start % 4 for start in starts):
            _name_non_finite(path, header)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _scan(file: BinaryIO) -> tuple[str, bool]:
    """Return the xxh3-128 of a file, and True if all its float32 words are finite.

    isfinite reads 30 GB/s, xxh3 35 GB/s.
    """
    digest, is_finite = xxhash.xxh3_128(), True
    while chunk := file.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
        words = np.frombuffer(chunk, dtype="<f4", count=len(chunk) // 4)
        is_finite = is_finite and bool(np.isfinite(words).all())
    return digest.hexdigest(), is_finite


def _name_non_finite(path: Path, header: Header) -> None:
    """Raise an error that names the first tensor with NaN or infinite numbers, if the shard has one.

    Raises: CheckpointError: if a tensor of the shard is not finite.
    """
    for key, tensor in header.tensors.items():
        count = (tensor.end - tensor.start) // 4
        if count and not np.isfinite(np.memmap(path, "<f4", "r", tensor.start, (count,))).all():
            raise CheckpointError(f"{path}: {key.rpartition('@')[0]} holds NaN or infinite numbers")


def read_shard_header(path: Path) -> tuple[Header, dict[str, tuple[int, ...]]]:
    """Return the header of a shard file and the logical shapes in it, by tensor.

    Raises: CheckpointError: if the file is not a safetensors file, or if it holds anything but flat float32 ranges that are
        inside the tensors that they name.
    """
    header = read_header(path, follow_links=False)
    text = header.metadata.get("shapes", "{}")
    shapes = parse_json(text, f"{path}: shapes", "a mapping of names to shapes", SHAPES_DEPTH)
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise CheckpointError(f"{path}: shapes is not a mapping of names to shapes")
    for key, stored in header.tensors.items():
        name, _, start = key.rpartition("@")
        if stored.dtype != "F32" or len(stored.shape) != 1 or not re.fullmatch(r"[0-9]{1,18}", start):
            raise CheckpointError(f"{path}: {key[:100]!r} is not a flat float32 range NAME@START")
        if name in shapes and int(start) + stored.shape[0] > math.prod(shapes[name]):
            raise CheckpointError(f"{path}: {key[:100]!r} is not inside a tensor of shape {tuple(shapes[name])}")
    return header, {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in shape)


def manifest_files(body: Mapping[str, Any]) -> list[FileRecord]:
    """Return the records of the shard files that a manifest lists."""
    return [FileRecord(str(f["name"]), int(f["size_bytes"]), str(f["xxh3"])) for f in body["files"]]


class ShardSet:
    """All shard files of one checkpoint. They are read lazily, so a slice reads only that slice. A context manager."""

    def __init__(self, folder: Path, records: list[FileRecord]) -> None:
        self._stack = ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, Any, str]]] = {}
        for record in records:
            self._index(folder / record.name)
        for name, ranges in self._ranges.items():
            ranges.sort(key=lambda stored: stored[:2])
            for before, after in itertools.pairwise(ranges):
                if before[0] + before[1] > after[0]:
                    raise CheckpointError(f"{folder}: {after[3]} overlaps {before[3]}, both of {name}")

    def _index(self, path: Path) -> None:
        header, shapes = read_shard_header(path)
        for name, shape in shapes.items():
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"{path}: {name} has shape {shape}, another shard says {self.shapes[name]}")
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: is not a safetensors file ({error})") from error
        for key, stored in header.tensors.items():
            tensor, _, start = key.rpartition("@")
            self._ranges.setdefault(tensor, []).append((int(start), stored.shape[0], handle, key))

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_into(self, tensor: str, start: int, target: Tensor) -> None:
        """Fill `target` (n,) with the elements [start, start + n) of a logical tensor.

        Raises: CheckpointError: if an element is missing.
        """
        filled, end = start, start + target.numel()
        for first, count, handle, key in self._ranges.get(tensor, ()):
            low, high = max(first, filled), min(first + count, end)
            if low != filled or high <= low:
                continue
            values = handle.get_slice(key)[low - first : high - first]
            target.narrow(0, low - start, high - low).copy_(values)
            filled = high
        if filled != end:
            raise CheckpointError(f"{tensor}: elements {filled}..{end} are not in the checkpoint")

    def tensor(self, name: str) -> Tensor:
        """Return a whole logical tensor, float32 in its logical shape.

        Raises: CheckpointError: if the tensor or a range of it is missing.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{name}: is not in the checkpoint")
        shape = self.shapes[name]
        size, stored = math.prod(shape), sum(count for _, count, _, _ in self._ranges.get(name, ()))
        if size != stored:
            raise CheckpointError(f"{name}: {stored} elements are in the checkpoint, shape {shape} has {size}")
        flat = torch.empty(size, dtype=torch.float32)
        self.read_into(name, 0, flat)
        return flat.view(shape)

    @property
    def kinds(self) -> set[str]:
        """The kinds of the logical tensors: `weight`, the averages, and the moments."""
        return {name.partition("/")[0] for name in self.shapes}

    def names(self, kind: str) -> Iterator[str]:
        """Yield the names of the logical tensors of a kind (`weight`, `ema`, ...), without the prefix."""
        prefix = f"{kind}/"
        return (name.removeprefix(prefix) for name in sorted(self.shapes) if name.startswith(prefix))
