"""Safetensors files: a header check that runs before a tensor is read, and a streaming writer.

Layout: 8 bytes of header length, a JSON header, then the bytes of the tensors without gaps. Source: safetensors' format
description.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sdit.checked_files import open_regular, parse_json
from sdit.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors package
LENGTH_BYTES = 8
MAX_DIMENSIONS = 64
DEPTH = 3  # the object of tensors, a tensor, its shape
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Dtype and shape of a tensor, and its bytes [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a safetensors file by name, and its metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file. No tensor is read.

    Raises: CheckpointError: if the file is not a regular file or its header is not valid: a length beyond the file, a
        duplicate key, an unknown dtype, or offsets that leave gaps, overlap or do not end at the file's end. The message
        names the file and the tensor.
    """
    try:
        with open_regular(path) as file:
            return parse_header(file, path, 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def parse_header(file: BinaryIO, path: Path, start: int, size: int) -> Header:
    """Return the header of the safetensors image in the bytes [start, start + size) of a file, with bytes of that file.

    Raises: CheckpointError: as `read_header`. OSError: if the file cannot be read.
    """
    file.seek(start)
    prefix = file.read(LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise CheckpointError(f"{path}: cannot be read: its header of {length} bytes does not fit in {size} bytes")
    values = parse_json(file.read(length), str(path), "a safetensors header", DEPTH)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: cannot be read: its header is not an object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a mapping of names to texts")
    first = start + LENGTH_BYTES + length
    tensors = {name: _tensor(path, name, entry, first) for name, entry in values.items()}
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: {_short(name)} {kind}")
        end = tensor.end
    if end != start + size:
        raise CheckpointError(f"{path}: its tensors end at byte {end}, the file at {start + size}")
    return Header(tensors, metadata)


def _tensor(path: Path, name: str, entry: Any, first: int) -> StoredTensor:
    """Return the entry of one tensor. `first` is the byte of the file at which offsets begin."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise CheckpointError(f"{path}: {_short(name)} does not have exactly the keys {', '.join(sorted(keys))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {_short(name)} has dtype {_short(dtype)}; legal: {', '.join(ITEM_BYTES)}")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {_short(name)} has shape {_short(shape)}, data_offsets {_short(offsets)}")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{path}: {_short(name)} needs {_short(needed)} bytes for shape {_short(shape)}, "
            f"data_offsets are {_short(offsets)}"
        )
    return StoredTensor(dtype, tuple(shape), first + offsets[0], first + offsets[1])


def is_sizes(values: Any) -> bool:
    """Return True if a JSON value is a list of at most `MAX_DIMENSIONS` sizes."""
    is_short_list = isinstance(values, list) and len(values) <= MAX_DIMENSIONS
    return is_short_list and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(value: object) -> str:
    """Return a value of the file in one short line."""
    text = str(value) if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write. `chunks()` yields its bytes in order, `size_bytes` in total. `dtype` is a key of ITEM_BYTES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def size_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def stream_tensors(
    entries: Sequence[TensorEntry], metadata: Mapping[str, str], write: Callable[[bytes | memoryview], object]
) -> int:
    """Pass the bytes of a file to `write`, the header first, and return their number.

    The safetensors package is not used, for three reasons. This function keeps only one chunk in memory, does not block
    other threads while it writes, and preserves the reason of a failure.
    """
    header = encode_header(entries, metadata)
    write(header)
    written = 0
    for entry in entries:
        for chunk in entry.chunks():
            write(chunk)
            written += chunk.nbytes
    assert written == sum(entry.size_bytes for entry in entries), written
    return len(header) + written


def encode_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file before its first tensor."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
