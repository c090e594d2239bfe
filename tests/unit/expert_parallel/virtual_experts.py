"""The state of sharded experts on one of W virtual ranks, for tests and benchmarks. Nothing is gathered: each rank is computed.

P ranks per group, so that W / P replicas have the same experts. M experts of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sdit.distributed.shards import ReplicaShare, Shard, owned_shards
from sdit.expert_parallel.migration import ExpertShards, ExpertState, ReplicaRanges
from sdit.topology import ExpertGroups

ROW_SHAPES = {"weight": (5, 7), "bias": (3,)}  # of an expert
KINDS = 2  # of state: masters, and a moment


def stacks(rank: int, groups: ExpertGroups, experts_of_rank: np.ndarray) -> list[Shard]:
    """Return the whole stacks of local experts of a rank, as it has them without ZeRO. Each is a tensor of its own."""
    blocks, _, local = experts_of_rank.shape
    found = []
    for block, (name, shape) in itertools.product(range(blocks), ROW_SHAPES.items()):
        flat = torch.zeros(local * int(np.prod(shape)))
        found.append(Shard(f"blocks.{block}.{name}", (local, *shape), 0, flat.numel(), flat, 0, cast(Any, None)))
    return found


class VirtualExperts:
    """The experts of one rank: a `MigratableState`. `experts` (blocks, P, M_local) are the ids of each rank's rows.

    `is_sharded`: each replica has an equal part of the state, as under ZeRO 1. Otherwise each replica has all of it, of which
    it owns a part.
    """

    def __init__(self, rank: int, groups: ExpertGroups, experts: np.ndarray, is_sharded: bool) -> None:
        self.experts, self._ep_rank, self.is_synced = experts, groups.ep_rank_of(rank), False
        whole = stacks(rank, groups, experts)
        owned = [_owned(whole, replica, groups.count) for replica in range(groups.count)]
        own = owned[groups.group_of(rank)]
        local = own if is_sharded else whole
        owned_ranges = ReplicaRanges([_ranges(shards) for shards in owned])
        local_ranges = owned_ranges if is_sharded else ReplicaRanges([_ranges(whole)] * groups.count)
        self.kinds = []
        for _ in range(KINDS):
            memory = {shard.name: torch.zeros_like(shard.flat) for shard in whole}
            source, target = ([_view(memory, shard) for shard in shards] for shards in (own, local))
            state = ExpertShards(own, source, owned_ranges), ExpertShards(local, target, local_ranges)
            self.kinds.append(ExpertState(*state))

    def expert_ids(self, parameter: str) -> Sequence[int]:
        """Return the global ids of the rows of a stack."""
        return [int(each) for each in self.experts_of_rank(parameter)[self._ep_rank]]

    def experts_of_rank(self, parameter: str) -> np.ndarray:
        """Return the global ids (P, M_local) of the rows of a stack on each rank of a group."""
        found: np.ndarray = self.experts[int(parameter.split(".")[1])]
        return found

    def expert_state(self) -> list[ExpertState]:
        """Return the state by kind."""
        return self.kinds

    def sync_compute_weights(self) -> None:
        """Note that it was called."""
        self.is_synced = True


def _owned(whole: list[Shard], replica: int, replicas: int) -> list[Shard]:
    return owned_shards(whole, {shard.name: ReplicaShare(replica, replicas) for shard in whole})


def _ranges(shards: Sequence[Shard]) -> list[tuple[str, int, int]]:
    return [(shard.name, shard.start, shard.start + shard.numel) for shard in shards]


def _view(memory: dict[str, Tensor], shard: Shard) -> Tensor:
    return memory[shard.name].narrow(0, shard.start, shard.numel)
