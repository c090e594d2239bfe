"""All state of a run that a checkpoint carries, and the way to disk and back."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import sdit
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore, Found, Snapshot, collect, restore
from sdit.clock import Clock, StepSpan
from sdit.config import ResolvedRun
from sdit.distributed.engine import Engine
from sdit.distributed.shards import Shard
from sdit.errors import CheckpointError
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.migration import ExpertState, expert_state
from sdit.expert_parallel.sharded_experts import expert_stacks
from sdit.train.ema import Average, Ema
from sdit.train.prior import PriorSchedule
from sdit.train.resume import Resumed, compare_configs
from sdit.train.rundata import RunData
from sdit.transfers import HostCopies


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
        self._copies, self._power_copies = HostCopies(), HostCopies()  # both may be written at the same time

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
        return self._collect([*self._weights(), *self._averages(self.ema.averages), *self._moments()], self._copies)

    def power_snapshot(self) -> Snapshot:
        """This rank's part of the power-function averages."""
        return self._collect(self._averages(self.ema.power), self._power_copies)

    def _collect(self, kinds: Sequence[StateKind], copies: HostCopies) -> Snapshot:
        views: dict[str, torch.Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for kind in kinds:
            more_views, more_shapes = collect(kind.name, kind.shards, kind.values, self.expert_ids)
            views |= more_views
            shapes |= more_shapes
        pending = copies.begin(list(views.values()))
        tensors = {key: host.numpy() for key, host in zip(views, pending.tensors, strict=True)}
        is_live = any(view.device.type == "cpu" for view in views.values())
        return Snapshot(self.clock.images_seen, tensors, shapes, self._facts(), is_live, pending.wait)

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
            "expert_parallel": self._run.expert_parallel,
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
        engine = self.engine
        with ShardSet(found.folder, found.manifest) as shards, torch.no_grad():
            problem = ""
            try:
                self._read(shards)
            except CheckpointError as error:
                problem = str(error)
            problems = [text for text in engine.comm.gather(problem) if text]
            if problems:
                raise CheckpointError(problems[0])
            for local, owned in ((engine.local, engine.owned), (engine.frozen_local, engine.frozen_owned)):
                engine.copy_to_replicas(local, owned, lambda shard: shard.master)
            for key in engine.moment_keys:
                local, owned = _with_moment(engine.local, key), _with_moment(engine.owned, key)
                engine.copy_to_replicas(local, owned, lambda shard: shard.moment(key))  # noqa: B023
        self.engine.sync_compute_weights()
        self.clock = Clock.from_json(found.manifest["clock"])
        self.engine.set_steps(self.clock.steps)
        stored = found.manifest
        self.prior.load(stored.get("prior_columns"), stored.get("prior_every_steps"), str(found.folder))
        return changes

    def _read(self, shards: ShardSet) -> None:
        """Read the owned state. The other ranks with a replica of it receive it afterwards, so each range is read once."""
        for owned in (self.engine.owned, self.engine.frozen_owned):
            restore(shards, "weight", owned, [shard.master for shard in owned], self.expert_ids)
        for key in self.engine.moment_keys:
            owned = _with_moment(self.engine.owned, key)
            restore(shards, key, owned, [shard.moment(key) for shard in owned], self.expert_ids)
        self._load_averages(shards)

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
