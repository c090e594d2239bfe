"""Files of a checkpoint: shards, their checksums, the manifest. Nothing here runs code from a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdit.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
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
    """Write flat float32 pieces by key, with the logical shapes, as a safetensors file, and fsync. Raises: OSError.

    Written here and not by the safetensors package: that one holds the interpreter's lock while it writes, loses the
    reason of a failure, and its file would have to be read again for the checksum.
    """
    header: dict[str, Any] = {
        "__metadata__": {"shapes": json.dumps({key: list(shape) for key, shape in shapes.items()})}
    }
    size = 0
    for key, flat in tensors.items():
        assert flat.dtype == np.float32 and flat.ndim == 1, key
        header[key] = {"dtype": "F32", "shape": [flat.size], "data_offsets": [size, size + flat.nbytes]}
        size += flat.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with (folder / name).open("wb") as file:
        parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for part in (*parts, *(np.ascontiguousarray(flat, dtype="<f4").data.cast("B") for flat in tensors.values())):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return FileRecord(name, file.tell(), digest.hexdigest())


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest with a checksum of itself; a torn one is recognised."""
    text = json.dumps(body, indent=1, sort_keys=True)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    path = folder / MANIFEST
    path.write_text(json.dumps(sealed, indent=1, sort_keys=True), encoding="utf-8")
    fsync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's body. Raises: CheckpointError when it is missing, torn or of another format."""
    path = folder / MANIFEST
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        body: dict[str, Any] = sealed["body"]
        text = json.dumps(body, indent=1, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
            raise CheckpointError(f"{path}: does not match its own checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is torn or not a manifest") from error
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {body.get('format')!r} is not known; legal: {FORMAT}")
    return body


def verify_file(folder: Path, record: FileRecord) -> None:
    """Raises: CheckpointError naming the file when it is missing or its size or checksum is wrong."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            raise CheckpointError(f"{path}: has {size} bytes, the manifest says {record.size_bytes}")
        if hash_file(path) != record.xxh3:
            raise CheckpointError(f"{path}: does not match its checksum")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


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
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def _index(self, path: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: is not a safetensors file ({error})") from error
        shapes = json.loads((handle.metadata() or {}).get("shapes", "{}"))
        self.shapes.update({key: tuple(shape) for key, shape in shapes.items()})
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            tensor, _, start = key.rpartition("@")
            count = handle.get_slice(key).get_shape()[0]
            self._pieces.setdefault(tensor, []).append((int(start), count, handle, key))

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
        flat = torch.empty(int(np.prod(shape, dtype=np.int64)), dtype=torch.float32)
        self.read_into(name, 0, flat)
        return flat.view(shape)

    def names(self, kind: str) -> Iterator[str]:
        """Logical tensor names of a kind (`weight`, `ema`, ...), without the prefix."""
        prefix = f"{kind}/"
        return (name.removeprefix(prefix) for name in sorted(self.shapes) if name.startswith(prefix))


def hash_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or a folder's entries, to storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Swap a small text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
