"""All state of a run that a checkpoint carries, and the way to disk and back."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

import sdit
from sdit.checkpoint.find import Found
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore, Snapshot, restore
from sdit.clock import Clock, StepSpan
from sdit.config import ResolvedRun
from sdit.distributed.engine import Engine
from sdit.errors import CheckpointError
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.train.ema import Ema
from sdit.train.prior import PriorSchedule
from sdit.train.resume import Resumed, compare_configs
from sdit.train.rundata import RunData
from sdit.train.state_kinds import StateKinds, with_moment


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
        self.kinds = StateKinds(engine, self.ema)

    def keep_length(self, resumed: Resumed) -> None:
        """Continue with the length of the run that the checkpoint, or a changed setting, gives."""
        self.length_images, self.last_batch = resumed.length_images, resumed.last_batch

    def next_step(self) -> StepSpan:
        """Return the step that begins at the present clock."""
        return StepSpan(self.clock, self.clock.after(self._run.batch.global_batch), self.length_images)

    def snapshot(self) -> Snapshot:
        """This rank's part of the state; arrays of what lives on the host (on a CPU all, or what is offloaded) are views."""
        return self.kinds.snapshot(self.clock.images_seen, self._facts())

    def power_snapshot(self) -> Snapshot:
        """This rank's part of the power-function averages."""
        return self.kinds.power_snapshot(self.clock.images_seen, self._facts())

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
            for text in engine.comm.first_reports(problem or None, 1).values():
                raise CheckpointError(text)
            for local, owned in ((engine.local, engine.owned), (engine.frozen_local, engine.frozen_owned)):
                engine.copy_to_replicas(local, owned, lambda shard: shard.master)
            for key in engine.moment_keys:
                local, owned = with_moment(engine.local, key), with_moment(engine.owned, key)
                engine.copy_to_replicas(local, owned, lambda shard: shard.moment(key))  # noqa: B023
        self.engine.sync_compute_weights()
        self.clock = Clock.from_json(found.manifest["clock"])
        self.engine.set_steps(self.clock.steps)
        stored = found.manifest
        self.experts.restore_counts(stored.get("expert_layout"))
        self.prior.load(stored.get("prior_columns"), stored.get("prior_every_steps"), str(found.folder))
        return changes

    def _read(self, shards: ShardSet) -> None:
        """Read the owned state. The other ranks with a replica of it receive it afterwards, so each range is read once."""
        for owned in (self.engine.owned, self.engine.frozen_owned):
            restore(shards, "weight", owned, [shard.master for shard in owned], self.kinds.expert_ids)
        for key in self.engine.moment_keys:
            owned = with_moment(self.engine.owned, key)
            restore(shards, key, owned, [shard.moment(key) for shard in owned], self.kinds.expert_ids)
        self._load_averages(shards)

    def _load_averages(self, shards: ShardSet) -> None:
        """Load the averages. One that the run began after this checkpoint starts at the weights, except that of ema.decay."""
        first, *others = self.ema.averages
        for average in (first, *(each for each in others if each.kind in shards.kinds)):
            restore(shards, average.kind, self.engine.owned, average.values, self.kinds.expert_ids)
        for average in others:
            if average.kind not in shards.kinds:
                self.ema.restart(average)
