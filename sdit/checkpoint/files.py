"""Files of a checkpoint: shards, their checksums, the manifest. Nothing here runs code from a file."""

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
MANIFEST_DEPTH = 16  # a seal, a body, a config's sections and lists
SHAPES_DEPTH = 2  # shapes by name
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Name, size in bytes and xxh3-128 of one shard."""

    name: str
    size_bytes: int
    xxh3: str


def write_shard(
    folder: Path, name: str, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> FileRecord:
    """Write flat float32 pieces by key, with the logical shapes, as a safetensors file, and fsync. Raises: OSError."""
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
    """Write the manifest with a checksum of itself; a torn one is recognised."""
    text = json.dumps(body, indent=1, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    path = folder / MANIFEST
    path.write_text(json.dumps(sealed, indent=1, sort_keys=True), encoding="utf-8")
    fsync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's body.

    Raises: CheckpointError when it is missing, torn, of another format, or does not hold what `check_manifest` asks for.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path, follow_links=False) as file:
            sealed = parse_json(read_bytes(file, path, MAX_MANIFEST_BYTES), str(path), "a manifest", MANIFEST_DEPTH)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(sealed, dict) or "body" not in sealed:
        raise CheckpointError(f"{path}: is torn or not a manifest")
    text = json.dumps(sealed["body"], indent=1, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != sealed.get("sha256"):
        raise CheckpointError(f"{path}: does not match its own checksum")
    body = sealed["body"]
    if isinstance(body, dict) and body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {body.get('format')!r:.100} is not known; legal: {FORMAT}")
    return check_manifest(body, path)


def verify_file(folder: Path, record: FileRecord) -> None:
    """Read a shard once and compare it with its record.

    Raises: CheckpointError naming the file when it is missing or no regular file, when its size, checksum or header is
        wrong, or when a tensor holds NaN or infinite numbers.
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
    """The xxh3-128 of a file, and whether all its float32 words are finite; isfinite reads 30 GB/s, xxh3 35 GB/s."""
    digest, is_finite = xxhash.xxh3_128(), True
    while chunk := file.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
        words = np.frombuffer(chunk, dtype="<f4", count=len(chunk) // 4)
        is_finite = is_finite and bool(np.isfinite(words).all())
    return digest.hexdigest(), is_finite


def _name_non_finite(path: Path, header: Header) -> None:
    """Raises: CheckpointError naming the first tensor of a shard that holds NaN or infinite numbers."""
    for key, tensor in header.tensors.items():
        count = (tensor.end - tensor.start) // 4
        if count and not np.isfinite(np.memmap(path, "<f4", "r", tensor.start, (count,))).all():
            raise CheckpointError(f"{path}: {key.rpartition('@')[0]} holds NaN or infinite numbers")


def read_shard_header(path: Path) -> tuple[Header, dict[str, tuple[int, ...]]]:
    """Return a shard's header and the logical shapes it states, by tensor.

    Raises: CheckpointError for what is no safetensors file, or holds anything but flat float32 pieces that lie within the
        tensors they name.
    """
    header = read_header(path, follow_links=False)
    text = header.metadata.get("shapes", "{}")
    shapes = parse_json(text, f"{path}: shapes", "a mapping of names to shapes", SHAPES_DEPTH)
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise CheckpointError(f"{path}: shapes is not a mapping of names to shapes")
    for key, stored in header.tensors.items():
        name, _, start = key.rpartition("@")
        if stored.dtype != "F32" or len(stored.shape) != 1 or not re.fullmatch(r"[0-9]{1,18}", start):
            raise CheckpointError(f"{path}: {key[:100]!r} is not a flat float32 piece NAME@START")
        if name in shapes and int(start) + stored.shape[0] > math.prod(shapes[name]):
            raise CheckpointError(f"{path}: {key[:100]!r} does not lie within a tensor of shape {tuple(shapes[name])}")
    return header, {name: tuple(shape) for name, shape in shapes.items()}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in shape)


def manifest_files(body: Mapping[str, Any]) -> list[FileRecord]:
    """The shards a manifest lists."""
    return [FileRecord(str(f["name"]), int(f["size_bytes"]), str(f["xxh3"])) for f in body["files"]]


class ShardSet:
    """All shards of one checkpoint, read lazily: a slice costs that slice. A context manager."""

    def __init__(self, folder: Path, records: list[FileRecord]) -> None:
        self._stack = ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = {}
        for record in records:
            self._index(folder / record.name)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            for before, after in itertools.pairwise(pieces):
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
            self._pieces.setdefault(tensor, []).append((int(start), stored.shape[0], handle, key))

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_into(self, tensor: str, start: int, target: Tensor) -> None:
        """Fill `target` (n,) with elements [start, start + n) of a logical tensor. Raises: CheckpointError on a gap."""
        filled, end = start, start + target.numel()
        for first, count, handle, key in self._pieces.get(tensor, ()):
            low, high = max(first, filled), min(first + count, end)
            if low != filled or high <= low:
                continue
            part = handle.get_slice(key)[low - first : high - first]
            target.narrow(0, low - start, high - low).copy_(part)
            filled = high
        if filled != end:
            raise CheckpointError(f"{tensor}: elements {filled}..{end} are not in the checkpoint")

    def tensor(self, name: str) -> Tensor:
        """The whole logical tensor (float32, its own shape)."""
        if name not in self.shapes:
            raise CheckpointError(f"{name}: is not in the checkpoint")
        shape = self.shapes[name]
        size, stored = math.prod(shape), sum(count for _, count, _, _ in self._pieces.get(name, ()))
        if size != stored:
            raise CheckpointError(f"{name}: {stored} elements are in the checkpoint, shape {shape} has {size}")
        flat = torch.empty(size, dtype=torch.float32)
        self.read_into(name, 0, flat)
        return flat.view(shape)

    def names(self, kind: str) -> Iterator[str]:
        """Logical tensor names of a kind (`weight`, `ema`, ...), without the prefix."""
        prefix = f"{kind}/"
        return (name.removeprefix(prefix) for name in sorted(self.shapes) if name.startswith(prefix))
