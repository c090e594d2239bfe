"""Moves experts between the ranks of a group, together with their moments and averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sdit.distributed.comm import Comm
from sdit.distributed.reshard import Range, reshard
from sdit.distributed.shards import Shard
from sdit.expert_parallel.logical_tensors import ExpertIds, shards_with_values


@dataclass(frozen=True)
class ExpertState:
    """One kind of state of the sharded experts: masters, a moment, or the EMA.

    `source` values (one tensor per shard) are written to the `target` values of the ranks that own the experts afterwards.
    Each element is in the source of exactly one rank. Under ZeRO 0 the targets have replicas.
    """

    source_shards: Sequence[Shard]
    source: Sequence[Tensor]
    target_shards: Sequence[Shard]
    target: Sequence[Tensor]


class MigratableState(Protocol):
    """The methods of a run's state that a migration of experts needs."""

    def expert_ids(self, parameter: str) -> Sequence[int] | None:
        """Return the global ids of the rows of a parameter, or None if it is not a stack of experts."""
        ...

    def expert_state(self) -> list[ExpertState]:
        """Return the state of all sharded experts, by kind."""
        ...

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights."""
        ...


def migrate(comm: Comm, state: MigratableState, rename: Callable[[], None]) -> None:
    """Move the state of all experts to their new ranks. All ranks call it together.

    `rename` sets the ids of the stacks of experts to those of the new placement.
    """
    kinds = state.expert_state()
    sources = [_ranges(kind.source_shards, kind.source, state.expert_ids) for kind in kinds]
    rename()
    for source, kind in zip(sources, kinds, strict=True):
        reshard(comm, source, _ranges(kind.target_shards, kind.target, state.expert_ids))
    state.sync_compute_weights()


def expert_state(
    sources: Sequence[Shard],
    source: Sequence[Tensor],
    targets: Sequence[Shard],
    target: Sequence[Tensor],
    ids: ExpertIds,
) -> ExpertState:
    """Return one kind of state (one tensor per shard), restricted to the shards of sharded experts."""
    from_experts = [index for index, shard in enumerate(sources) if ids(shard.name) is not None]
    to_experts = [index for index, shard in enumerate(targets) if ids(shard.name) is not None]
    return ExpertState(
        [sources[index] for index in from_experts],
        [source[index] for index in from_experts],
        [targets[index] for index in to_experts],
        [target[index] for index in to_experts],
    )


def _ranges(shards: Sequence[Shard], values: Sequence[Tensor], ids: ExpertIds) -> list[Range]:
    return [Range(logical.name, logical.start, view) for logical, view in shards_with_values(shards, values, ids)]
