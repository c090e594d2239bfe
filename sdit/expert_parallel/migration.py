"""Moves experts between the ranks of a group, together with their moments and averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from sdit.distributed.comm import Comm
from sdit.distributed.reshard import Range, reshard
from sdit.distributed.shards import Shard
from sdit.expert_parallel.logical_tensors import ExpertIds, shards_with_values


class ReplicaRanges:
    """Which range of each stack of experts each rank with the same experts has. It does not change during a run.

    Replica r of a group of P ranks is rank r P + its rank in the group. `ranges[r]` are (parameter, start, end) of replica r.
    """

    def __init__(self, ranges: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        rows: dict[str, list[tuple[int, int, int]]] = {}
        for replica, owned in enumerate(ranges):
            for parameter, start, end in owned:
                rows.setdefault(parameter, []).append((replica, start, end))
        self._rows = {parameter: np.array(found, dtype=np.int64).T for parameter, found in rows.items()}

    def find(self, parameter: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (replica, start, end) of each part of [start, end) that a replica has."""
        replicas, starts, ends = self._rows[parameter]
        found = (starts < end) & (ends > start)
        parts = replicas[found], starts[found].clip(min=start), ends[found].clip(max=end)
        yield from zip(*(column.tolist() for column in parts), strict=True)


@dataclass(frozen=True)
class ExpertHolders:
    """Under one placement: the ranks that have parts of an expert. Called with NAME#ID and a range, it yields them.

    `experts_of_rank` (P, M_local) are the global ids of each rank's rows, and `row_elements` the size of a row, by parameter.
    """

    experts_of_rank: Mapping[str, np.ndarray]
    row_elements: Mapping[str, int]
    ranges: ReplicaRanges

    def __call__(self, name: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        parameter, _, expert = name.rpartition("#")
        ids = self.experts_of_rank[parameter]
        ((ep_rank, row),) = np.argwhere(ids == int(expert)).tolist()
        first = row * self.row_elements[parameter]
        for replica, low, high in self.ranges.find(parameter, first + start, first + end):
            yield replica * len(ids) + ep_rank, low - first, high - first


@dataclass(frozen=True)
class ExpertShards:
    """This rank's shards of the sharded experts, a tensor of values for each, and the ranges that all replicas have."""

    shards: Sequence[Shard]
    values: Sequence[Tensor]
    ranges: ReplicaRanges

    def logical_ranges(self, ids: ExpertIds) -> list[Range]:
        """Return the range of each expert, whose values are views."""
        parts = shards_with_values(self.shards, self.values, ids)
        return [Range(logical.name, logical.start, view) for logical, view in parts]


@dataclass(frozen=True)
class ExpertState:
    """One kind of state of the sharded experts: masters, a moment, or the EMA.

    The values of `source` are written to those of `target` on the ranks that own the experts afterwards. Each element is in
    the source of exactly one rank. Under ZeRO 0 the targets have replicas.
    """

    source: ExpertShards
    target: ExpertShards


class MigratableState(Protocol):
    """The methods of a run's state that a migration of experts needs."""

    def expert_ids(self, parameter: str) -> Sequence[int] | None:
        """Return the global ids of the rows of a parameter, or None if it is not a stack of experts."""

    def experts_of_rank(self, parameter: str) -> np.ndarray:
        """Return the global ids (P, M_local) of the rows of a stack of sharded experts on each rank of a group."""

    def expert_state(self) -> list[ExpertState]:
        """Return the state of all sharded experts, by kind."""

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights."""


def migrate(comm: Comm, state: MigratableState, rename: Callable[[], None]) -> None:
    """Move the state of all experts to their new ranks. All ranks call it together.

    `rename` sets the ids of the stacks of experts to those of the new placement.
    """
    kinds = state.expert_state()
    shards = [shard for kind in kinds for shard in (*kind.source.shards, *kind.target.shards)]
    rows = {shard.name: math.prod(shard.shape[1:]) for shard in shards}
    sources = [kind.source.logical_ranges(state.expert_ids) for kind in kinds]
    before = {name: state.experts_of_rank(name) for name in rows}
    rename()
    after = {name: state.experts_of_rank(name) for name in rows}
    for source, kind in zip(sources, kinds, strict=True):
        owners = ExpertHolders(before, rows, kind.source.ranges)
        users = ExpertHolders(after, rows, kind.target.ranges)
        reshard(comm, source, kind.target.logical_ranges(state.expert_ids), owners, users)
    state.sync_compute_weights()


def expert_shards(
    shards: Sequence[Shard], values: Sequence[Tensor], ids: ExpertIds, ranges: ReplicaRanges
) -> ExpertShards:
    """Return one kind of state (one tensor per shard), restricted to the shards of sharded experts."""
    chosen = [index for index, shard in enumerate(shards) if ids(shard.name) is not None]
    return ExpertShards([shards[index] for index in chosen], [values[index] for index in chosen], ranges)
