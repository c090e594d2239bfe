"""Writes a power-function average of any width, combined from stored ones, as one file of published weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from sdit.checkpoint.export import file_facts, model_entries, write_safetensors
from sdit.checkpoint.load import stored_config
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.snapshots import StoredAverage
from sdit.clock import Clock
from sdit.contracts import Progress
from sdit.data.identity import stored_identity
from sdit.errors import CheckpointError

Term = tuple[StoredAverage, float]


class CombinedAverages:
    """The sum of stored averages, each times its coefficient, under the names `ema/NAME`. A context manager.

    Ranges are read when they are asked for. The sum is computed in float64.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._stack, found = ExitStack(), {average.found.folder: average.found for average, _ in terms}
        opened = {folder: self._stack.enter_context(ShardSet(folder, each.manifest)) for folder, each in found.items()}
        self._terms = [(opened[average.found.folder], average.kind, coefficient) for average, coefficient in terms]
        first, kind, _ = self._terms[0]
        self.shapes = {f"ema/{name}": first.shapes[f"{kind}/{name}"] for name in first.names(kind)}
        for shards, other, _ in self._terms:
            for name, shape in self.shapes.items():
                if shards.shapes.get(f"{other}/{name.removeprefix('ema/')}") != shape:
                    raise CheckpointError(f"{other}/{name.removeprefix('ema/')}: differs between the stored averages")

    def __enter__(self) -> CombinedAverages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read_into(self, tensor: str, start: int, target: Tensor) -> None:
        """Fill `target` (n,) with the elements [start, start + n) of a logical tensor `ema/NAME`."""
        total = torch.zeros(target.shape, dtype=torch.float64)
        part = torch.empty(target.shape)
        for shards, kind, coefficient in self._terms:
            shards.read_into(f"{kind}/{tensor.removeprefix('ema/')}", start, part)
            total.add_(part, alpha=coefficient)
        target.copy_(total)


def export_average(terms: Sequence[Term], images: int, out: Path, progress: Progress | None = None) -> None:
    """Write the combination of stored averages of one run to a safetensors file, atomically.

    The file is read like one that `sdit export` wrote. `images` is the time of the average.

    Raises: CheckpointError: if an average is damaged, or `out` cannot be written.
    """
    newest = max((average for average, _ in terms), key=lambda average: average.images).found
    config = stored_config(newest.manifest["config"], str(newest.folder))
    clock = Clock(images, newest.manifest["clock"]["steps"])
    facts = file_facts(config, clock, "ema", stored_identity(newest.manifest.get("data"), str(newest.folder)))
    with CombinedAverages(terms) as combined:
        write_safetensors(out, model_entries(config, combined, "ema", torch.float32), facts, progress)
