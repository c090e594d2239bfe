"""All state of a run that a checkpoint carries, and the way to disk and back."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import sdit
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore, Found, Snapshot, collect, restore
from sdit.clock import Clock, StepSpan
from sdit.config import ResolvedRun
from sdit.distributed.engine import Engine
from sdit.distributed.shards import Shard
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.migration import ExpertState, expert_state
from sdit.expert_parallel.sharded_experts import expert_stacks
from sdit.train.ema import Average, Ema
from sdit.train.prior import PriorSchedule
from sdit.train.resume import Resumed, compare_configs
from sdit.train.rundata import RunData


@dataclass(frozen=True)
class StateKind:
    """One kind of state in a checkpoint: `values[i]` (numel,) fp32 belongs to `shards[i]`."""

    name: str
    shards: Sequence[Shard]
    values: Sequence[torch.Tensor]


class RunState:
    """Weights, moments, EMA and clock of a run under any layout."""

    def __init__(
        self, run: ResolvedRun, engine: Engine, store: CheckpointStore, data: RunData, experts: ExpertParallel
    ) -> None:
        config = run.config
        self._run, self.config, self.engine, self.store = run, config, engine, store
        self.ema = Ema(config.ema, engine.owned)
        self.experts, self.data = experts, data
        self.prior = PriorSchedule.of(config)
        self.clock = Clock()
        self.length_images = config.train.total_images
        self.last_batch = config.train.global_batch  # images of the newest step, perhaps of an earlier process
        self._stacks = expert_stacks(engine.module)

    def keep_length(self, resumed: Resumed) -> None:
        """Continue with the length of the run that the checkpoint, or a changed setting, gives."""
        self.length_images, self.last_batch = resumed.length_images, resumed.last_batch

    def next_step(self) -> StepSpan:
        """Return the step that begins at the present clock."""
        return StepSpan(self.clock, self.clock.after(self._run.batch.global_batch), self.length_images)

    def expert_ids(self, parameter: str) -> Sequence[int] | None:
        """Global expert id of every row of a parameter; None when it is no stack of experts."""
        module = self._stacks.get(parameter.rpartition(".")[0])
        return None if module is None else module.ids

    def snapshot(self) -> Snapshot:
        """This rank's part of the state; arrays of what lives on the host (on a CPU all, or what is offloaded) are views."""
        return self._collect([*self._weights(), *self._averages(self.ema.averages), *self._moments()])

    def power_snapshot(self) -> Snapshot:
        """This rank's part of the power-function averages."""
        return self._collect(self._averages(self.ema.power))

    def _collect(self, kinds: Sequence[StateKind]) -> Snapshot:
        tensors: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for kind in kinds:
            more_tensors, more_shapes = collect(kind.name, kind.shards, kind.values, self.expert_ids)
            tensors |= more_tensors
            shapes |= more_shapes
        is_live = any(value.device.type == "cpu" for kind in kinds for value in kind.values)
        return Snapshot(self.clock.images_seen, tensors, shapes, self._facts(), is_live)

    def _weights(self) -> list[StateKind]:
        owned, frozen = self.engine.owned, self.engine.frozen_owned
        return [StateKind("weight", shards, [shard.master for shard in shards]) for shards in (owned, frozen)]

    def _averages(self, averages: Sequence[Average]) -> list[StateKind]:
        """The averages. The average of a frozen parameter is the parameter itself."""
        owned, frozen = self.engine.owned, self.engine.frozen_owned
        kinds = [StateKind(average.kind, owned, average.values) for average in averages]
        masters = [shard.master for shard in frozen]
        return kinds + [StateKind(average.kind, frozen, masters) for average in averages if frozen]

    def _moments(self) -> list[StateKind]:
        with_key = {key: _with_moment(self.engine.owned, key) for key in self.engine.moment_keys}
        return [StateKind(key, shards, [s.moment(key) for s in shards]) for key, shards in with_key.items()]

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint over all ranks: masters, averages and moments, four bytes each."""
        kinds = [*self._weights(), *self._averages(self.ema.averages), *self._moments()]
        numel = sum(shard.numel for kind in kinds for shard in kind.shards)
        box = torch.tensor([numel], dtype=torch.float64, device=self.engine.comm.device)
        return 4 * int(self.engine.comm.sum(box).item())

    def _facts(self) -> dict[str, Any]:
        comm = self.engine.comm
        return {
            "clock": asdict(self.clock),
            "config": self.config.model_dump(mode="json"),
            "length_images": self.length_images,
            "prior_columns": self.prior.columns,
            "prior_every_steps": self.prior.chosen,
            "expert_layout": self.experts.stored(),
            **self.data.stored(),
            "written_by": {
                "sdit": sdit.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "ranks": comm.world,
            },
        }

    def expert_state(self) -> list[ExpertState]:
        """The state of all sharded experts, by kind."""
        engine, ids = self.engine, self.expert_ids
        pairs = [(engine.owned, engine.local), (engine.frozen_owned, engine.frozen_local)]
        kinds = [expert_state(a, [s.master for s in a], b, [s.master for s in b], ids) for a, b in pairs]
        for key in engine.moment_keys:
            owned, local = _with_moment(engine.owned, key), _with_moment(engine.local, key)
            moments = [shard.moment(key) for shard in owned], [shard.moment(key) for shard in local]
            kinds.append(expert_state(owned, moments[0], local, moments[1], ids))
        for average in self.ema.averages:
            kinds.append(expert_state(engine.owned, average.values, engine.owned, average.values, ids))
        return kinds

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights."""
        self.engine.sync_compute_weights()

    def load(self, found: Found) -> list[str]:
        """Load a checkpoint of any layout; return the config changes, a line each.

        Raises:
            ConfigError: the checkpoint is of another run (model, seed, data, objective).
            CheckpointError: a tensor is missing or of another shape.
        """
        changes = compare_configs(found.manifest["config"], self.config.model_dump(mode="json"), str(found.folder))
        with ShardSet(found.folder, found.manifest) as shards, torch.no_grad():
            for local in (self.engine.local, self.engine.frozen_local):
                restore(shards, "weight", local, [shard.master for shard in local], self.expert_ids)
            for key in self.engine.moment_keys:
                local = _with_moment(self.engine.local, key)
                restore(shards, key, local, [shard.moment(key) for shard in local], self.expert_ids)
            self._load_averages(shards)
        self.engine.sync_compute_weights()
        self.clock = Clock.from_json(found.manifest["clock"])
        self.engine.set_steps(self.clock.steps)
        stored = found.manifest
        self.prior.load(stored.get("prior_columns"), stored.get("prior_every_steps"), str(found.folder))
        return changes

    def _load_averages(self, shards: ShardSet) -> None:
        """Load the averages. One that the run began after this checkpoint starts at the weights, except that of ema.decay."""
        first, *others = self.ema.averages
        for average in (first, *(each for each in others if each.kind in shards.kinds)):
            restore(shards, average.kind, self.engine.owned, average.values, self.expert_ids)
        for average in others:
            if average.kind not in shards.kinds:
                self.ema.restart(average)


def _with_moment(shards: Sequence[Shard], key: str) -> list[Shard]:
    return [shard for shard in shards if shard.has_moment(key)]
