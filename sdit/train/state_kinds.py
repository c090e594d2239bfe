"""The kinds of state of a run - weights, averages, moments - and the collection of them for a checkpoint or for moved experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.checkpoint.store import Snapshot, collect
from sdit.distributed.engine import Engine
from sdit.distributed.shards import Shard
from sdit.expert_parallel.migration import ExpertState, ReplicaRanges, expert_shards
from sdit.expert_parallel.sharded_experts import ShardedExperts, expert_stacks
from sdit.train.ema import Average, Ema
from sdit.transfers import HostCopies


@dataclass(frozen=True)
class StateKind:
    """One kind of state in a checkpoint: `values[i]` (numel,) fp32 belongs to `shards[i]`."""

    name: str
    shards: Sequence[Shard]
    values: Sequence[torch.Tensor]


class StateKinds:
    """Lists this rank's part of the state by kind, and collects it. A `MigratableState`."""

    def __init__(self, engine: Engine, ema: Ema) -> None:
        self._engine, self._ema = engine, ema
        self._stacks = expert_stacks(engine.module)
        self._owned_ranges = self._ranges_of_replicas(engine.owned, engine.frozen_owned)
        self._local_ranges = self._ranges_of_replicas(engine.local, engine.frozen_local)
        self._copies, self._power_copies = HostCopies(), HostCopies()  # both may be written at the same time

    def expert_ids(self, parameter: str) -> Sequence[int] | None:
        """Global expert id of every row of a parameter; None when it is no stack of experts."""
        module = self._stacks.get(parameter.rpartition(".")[0])
        return None if module is None else module.ids

    def experts_of_rank(self, parameter: str) -> np.ndarray:
        """Global expert ids (P, M_local) of every row of a stack of sharded experts on each rank of a group."""
        module = self._stacks[parameter.rpartition(".")[0]]
        assert isinstance(module, ShardedExperts), parameter
        return module.experts_of_rank

    def _ranges_of_replicas(self, *shards: Sequence[Shard]) -> ReplicaRanges:
        """The ranges of the sharded experts on the ranks with the same experts. They are gathered while a run starts."""
        sharded = [f"{name}." for name, module in self._stacks.items() if isinstance(module, ShardedExperts)]
        names = [name for name, _ in self._engine.module.named_parameters() if name.startswith(tuple(sharded))]
        if not names:
            return ReplicaRanges([])
        own = [
            (s.name, s.start, s.start + s.numel) for part in shards for s in part if s.name.startswith(tuple(sharded))
        ]
        return ReplicaRanges(self._engine.gather_from_replicas(names[0], own))

    def snapshot(self, images_seen: int, facts: dict[str, Any]) -> Snapshot:
        """This rank's part of the state; arrays of what lives on the host (on a CPU all, or what is offloaded) are views."""
        return self._collect(self._of_checkpoint(), self._copies, images_seen, facts)

    def power_snapshot(self, images_seen: int, facts: dict[str, Any]) -> Snapshot:
        """This rank's part of the power-function averages."""
        return self._collect(self._averages(self._ema.power), self._power_copies, images_seen, facts)

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint over all ranks: masters, averages and moments, four bytes each."""
        numel, comm = sum(shard.numel for kind in self._of_checkpoint() for shard in kind.shards), self._engine.comm
        return 4 * int(comm.sum(torch.tensor([numel], dtype=torch.float64, device=comm.device)).item())

    def expert_state(self) -> list[ExpertState]:
        """The state of all sharded experts, by kind."""
        engine, ids = self._engine, self.expert_ids

        def state(owned: Sequence[Shard], local: Sequence[Shard], values: Callable[[Shard], Tensor]) -> ExpertState:
            source = expert_shards(owned, [values(shard) for shard in owned], ids, self._owned_ranges)
            return ExpertState(
                source, expert_shards(local, [values(shard) for shard in local], ids, self._local_ranges)
            )

        master = attrgetter("master")
        kinds = [state(engine.owned, engine.local, master), state(engine.frozen_owned, engine.frozen_local, master)]
        for key in engine.moment_keys:
            owned, local = with_moment(engine.owned, key), with_moment(engine.local, key)
            kinds.append(state(owned, local, methodcaller("moment", key)))
        for average in self._ema.averages:
            averaged = expert_shards(engine.owned, average.values, ids, self._owned_ranges)
            kinds.append(ExpertState(averaged, averaged))
        return kinds

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights."""
        self._engine.sync_compute_weights()

    def _of_checkpoint(self) -> list[StateKind]:
        engine = self._engine
        owned = (engine.owned, engine.frozen_owned)
        weights = [StateKind("weight", shards, [each.master for each in shards]) for shards in owned]
        with_key = {key: with_moment(engine.owned, key) for key in engine.moment_keys}
        moments = [StateKind(key, shards, [each.moment(key) for each in shards]) for key, shards in with_key.items()]
        return [*weights, *self._averages(self._ema.averages), *moments]

    def _averages(self, averages: Sequence[Average]) -> list[StateKind]:
        """The averages. The average of a frozen parameter is the parameter itself."""
        owned, frozen = self._engine.owned, self._engine.frozen_owned
        kinds = [StateKind(average.kind, owned, average.values) for average in averages]
        masters = [shard.master for shard in frozen]
        return kinds + [StateKind(average.kind, frozen, masters) for average in averages if frozen]

    def _collect(
        self, kinds: Sequence[StateKind], copies: HostCopies, images_seen: int, facts: dict[str, Any]
    ) -> Snapshot:
        views: dict[str, torch.Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for kind in kinds:
            more_views, more_shapes = collect(kind.name, kind.shards, kind.values, self.expert_ids)
            views |= more_views
            shapes |= more_shapes
        pending = copies.begin(list(views.values()))
        tensors = {key: host.numpy() for key, host in zip(views, pending.tensors, strict=True)}
        is_live = any(view.device.type == "cpu" for view in views.values())
        return Snapshot(images_seen, tensors, shapes, facts, is_live, pending.wait)


def with_moment(shards: Sequence[Shard], key: str) -> list[Shard]:
    """The shards whose optimizer state has this moment."""
    return [shard for shard in shards if shard.has_moment(key)]
