"""The index of a checkpoint: which range of which logical tensor is stored at which byte of which shard.

The manifest holds it, so that a rank opens only the files that it reads. It has one row per stored range. The rows are five
int64 columns, sorted by tensor and start. The manifest stores their differences as zlib in base64. A checkpoint of an older
version has no index. Its index is made from the headers of all shards.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdit.errors import CheckpointError

COLUMNS = 5  # tensor, start, count, shard, offset
MAX_RANGES = 1 << 22  # of an index that is stored; a row takes at most 12 bytes of the manifest
LARGEST = 1 << 60  # sums of two, and four times a count, fit in int64
ELEMENT_BYTES = 4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShardTable:
    """What one shard holds: the first byte in the file and the elements of each range by key, and the shapes by tensor."""

    ranges: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class StoredRange:
    """Elements [start, start + count) of a logical tensor, at byte `offset` of the file that has the shard."""

    start: int
    count: int
    shard: int
    offset: int


class ShardIndex:
    """The stored ranges of all logical tensors `KIND/NAME`, with the logical shapes."""

    def __init__(self, shapes: Mapping[str, Shape], columns: np.ndarray) -> None:
        """`columns` (5, n) int64. The column `tensor` counts the keys of `shapes` in their order.

        Raises: CheckpointError: if two ranges overlap, or a range is not inside its tensor.
        """
        self.shapes = dict(shapes)
        self._names = list(self.shapes)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        order = np.lexsort((columns[2], columns[1], columns[0]))
        self._tensor, self._start, self._count, self._shard, self._offset = (column[order] for column in columns)
        self._first = np.searchsorted(self._tensor, np.arange(len(self._names) + 1))
        self._check_ranges()
        self._by_shard: np.ndarray | None = None

    def _check_ranges(self) -> None:
        sizes = np.array([min(math.prod(shape), LARGEST) for shape in self.shapes.values()] or [0], dtype=np.int64)
        ends = self._start + self._count
        for row in np.flatnonzero(ends > sizes[self._tensor])[:1]:
            shape = self.shapes[self._names[self._tensor[row]]]
            raise CheckpointError(f"{self._key(row)!r:.100} is not inside a tensor of shape {shape}")
        overlaps = (self._tensor[1:] == self._tensor[:-1]) & (ends[:-1] > self._start[1:])
        for row in np.flatnonzero(overlaps)[:1]:
            name = self._names[self._tensor[row]]
            raise CheckpointError(f"{self._key(row + 1)} overlaps {self._key(row)}, both of {name}")

    def _key(self, row: int) -> str:
        return f"{self._names[self._tensor[row]]}@{self._start[row]}"

    @classmethod
    def of(cls, tables: Sequence[ShardTable]) -> ShardIndex:
        """Return the index of shards with these tables, in the order of the manifest.

        Raises: CheckpointError: if two shards contradict each other.
        """
        shapes: dict[str, Shape] = {}
        for table in tables:
            for name, shape in table.shapes.items():
                if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise CheckpointError(f"{name} has shape {tuple(shape)}, another shard says {shapes[name]}")
        shapes = {name: shapes[name] for name in sorted(shapes, key=_parts)}
        numbers = {name: number for number, name in enumerate(shapes)}
        rows = []
        for shard, table in enumerate(tables):
            for key, (offset, count) in table.ranges.items():
                name, _, start = key.rpartition("@")
                if name in numbers:  # a range without a shape cannot be read
                    rows.append((numbers[name], int(start), count, shard, offset))
        return cls(shapes, np.array(rows, dtype=np.int64).reshape(-1, COLUMNS).T)

    def __len__(self) -> int:
        return len(self._tensor)

    def find(self, tensor: str, start: int, end: int) -> Iterator[StoredRange]:
        """Yield the stored ranges that can hold elements [start, end) of a tensor, by their start."""
        if tensor not in self._numbers:
            return
        number = self._numbers[tensor]
        first, last = int(self._first[number]), int(self._first[number + 1])
        starts = self._start[first:last]
        low = first + max(0, int(np.searchsorted(starts, start, "right")) - 1)
        for row in range(low, first + int(np.searchsorted(starts, end, "left"))):
            yield StoredRange(
                int(self._start[row]), int(self._count[row]), int(self._shard[row]), int(self._offset[row])
            )

    def table_of(self, shard: int) -> ShardTable:
        """Return what a shard holds."""
        if self._by_shard is None:
            self._by_shard = np.argsort(self._shard, kind="stable")
        low, high = np.searchsorted(self._shard, [shard, shard + 1], sorter=self._by_shard)
        rows = self._by_shard[low:high]
        names = [self._names[number] for number in self._tensor[rows]]
        ranges = {self._key(row): (int(self._offset[row]), int(self._count[row])) for row in rows}
        return ShardTable(ranges, {name: self.shapes[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """Return the index for the manifest. Kinds share the names and shapes of their tensors."""
        parts = [_parts(name) for name in self._names]
        kinds = sorted({kind for kind, _ in parts})
        shapes = {name: self.shapes[full] for (_, name), full in zip(parts, self._names, strict=True)}
        names = {name: number for number, name in enumerate(sorted(shapes))}
        for (_, name), full in zip(parts, self._names, strict=True):
            assert shapes[name] == self.shapes[full], f"{full}: the kinds differ in its shape"
        tensors = np.array([kinds.index(kind) * len(names) + names[name] for kind, name in parts], dtype=np.int64)
        columns = np.stack([tensors[self._tensor], self._start, self._count, self._shard, self._offset])
        packed = zlib.compress(np.diff(columns, axis=1, prepend=0).astype("<i8").tobytes())
        return {
            "kinds": kinds,
            "shapes": {name: list(shapes[name]) for name in names},
            "count": columns.shape[1],
            "ranges": base64.b64encode(packed).decode(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], spans: Sequence[tuple[int, int]]) -> ShardIndex:
        """Return the index in a manifest. `spans` are the bytes [start, end) of each shard in its file.

        Raises: CheckpointError: if a range is not inside its tensor and its shard, or two ranges overlap.
        """
        kinds, names = value["kinds"], sorted(value["shapes"])
        columns = _unpacked(value["ranges"], value["count"])
        tensor, start, count, shard, offset = columns
        starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        is_legal = (tensor < len(kinds) * len(names)) & (shard < len(spans)) & (columns >= 0).all(axis=0)
        if not is_legal.all() or (columns > LARGEST).any():
            raise CheckpointError("ranges has numbers that are not legal")
        if ((offset < starts[shard]) | (offset + ELEMENT_BYTES * count > ends[shard])).any():
            raise CheckpointError("ranges has bytes outside their shard")
        used = np.unique(tensor)
        full = [(f"{kinds[n // len(names)]}/{names[n % len(names)]}", names[n % len(names)]) for n in used.tolist()]
        shapes = {name: tuple(value["shapes"][short]) for name, short in full}
        return cls(shapes, np.stack([np.searchsorted(used, tensor), start, count, shard, offset]))


def _parts(name: str) -> tuple[str, str]:
    """Return the kind and the name of a logical tensor."""
    kind, _, rest = name.partition("/")
    return kind, rest


def _unpacked(text: str, count: int) -> np.ndarray:
    """Return the columns (5, count) of the packed ranges. At most their size is unpacked.

    Raises: CheckpointError: if they are damaged or of another size.
    """
    if count > MAX_RANGES:
        raise CheckpointError(f"count: {count} is not legal; legal: at most {MAX_RANGES}")
    size = 8 * COLUMNS * count
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise CheckpointError(f"ranges cannot be unpacked ({error})") from None
    if len(data) != size:
        raise CheckpointError(f"ranges has not {count} rows")
    return np.cumsum(np.frombuffer(data, dtype="<i8").reshape(COLUMNS, count), axis=1)
