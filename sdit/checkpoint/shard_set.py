"""Reads the logical tensors of one checkpoint. It is the only reader of shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.checked_files import open_regular
from sdit.checkpoint.files import MANIFEST, manifest_shards, read_shard_table
from sdit.checkpoint.index import ELEMENT_BYTES, Shape, ShardIndex, StoredRange
from sdit.errors import CheckpointError

MAX_OPEN_FILES = 64


def index_of(folder: Path, manifest: Mapping[str, Any]) -> ShardIndex:
    """Return the index of a checkpoint. An older version wrote none, so the headers of all its shards are read.

    Raises: CheckpointError: if the index is not legal, or the headers contradict each other. The message names the folder.
    """
    records = manifest_shards(manifest)
    stored = manifest.get("index")
    where = folder if stored is None else f"{folder / MANIFEST}: index"
    tables = [] if stored is not None else [read_shard_table(folder, record) for record in records]
    try:
        if stored is not None:
            return ShardIndex.from_json(stored, [(record.start, record.end) for record in records])
        return ShardIndex.of(tables)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


class ShardSet:
    """All shards of one checkpoint. A file is opened when a range in it is read. A context manager."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder, self._records = folder, manifest_shards(manifest)
        self._index = index_of(folder, manifest)
        self.shapes: dict[str, Shape] = self._index.shapes  # by KIND/NAME
        self._files: OrderedDict[str, BufferedReader] = OrderedDict()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read_into(self, tensor: str, start: int, target: Tensor) -> None:
        """Fill `target` (n,) with the elements [start, start + n) of a logical tensor.

        Raises: CheckpointError: if an element is missing.
        """
        filled, end = start, start + target.numel()
        for stored in self._index.find(tensor, start, end):
            low, high = max(stored.start, filled), min(stored.start + stored.count, end)
            if low != filled or high <= low:
                continue
            self._read(stored, low, target.narrow(0, low - start, high - low))
            filled = high
        if filled != end:
            raise CheckpointError(f"{tensor}: elements {filled}..{end} are not in the checkpoint")

    def _read(self, stored: StoredRange, low: int, target: Tensor) -> None:
        """Fill `target` with elements of a stored range, from element `low` of the tensor."""
        is_direct = target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous()
        host = target.detach().numpy() if is_direct else np.empty(target.numel(), dtype="<f4")
        record, first = self._records[stored.shard], stored.offset + ELEMENT_BYTES * (low - stored.start)
        path = self._folder / record.name
        try:
            file = self._open(record.name)
            file.seek(first)
            count = file.readinto(host.data.cast("B"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if count != host.nbytes:
            raise CheckpointError(f"{path}: bytes {first + count}..{first + host.nbytes} are missing")
        if not is_direct:
            target.copy_(torch.from_numpy(host))

    def _open(self, name: str) -> BufferedReader:
        """Return an open file. Of many files the one that was not used for the longest time is closed."""
        if name not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[name] = open_regular(self._folder / name, follow_links=False)
        self._files.move_to_end(name)
        return self._files[name]

    @property
    def kinds(self) -> set[str]:
        """The kinds of the logical tensors: `weight`, the averages, and the moments."""
        return {name.partition("/")[0] for name in self.shapes}

    def names(self, kind: str) -> Iterator[str]:
        """Yield the names of the logical tensors of a kind (`weight`, `ema`, ...), without the prefix."""
        prefix = f"{kind}/"
        return (name.removeprefix(prefix) for name in sorted(self.shapes) if name.startswith(prefix))
