"""All state of a run that a checkpoint carries, and the way to disk and back."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

import sdit
from sdit.checkpoint.files import ShardSet, manifest_files
from sdit.checkpoint.store import CheckpointStore, Found, Snapshot, collect, restore
from sdit.clock import Clock, StepSpan
from sdit.config import ResolvedRun
from sdit.distributed.engine import Engine
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.migration import ExpertState, expert_state
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.model.moe.base import Experts
from sdit.time_law import prior_law
from sdit.train.ema import Ema
from sdit.train.prior import PriorSchedule
from sdit.train.resume import Resumed, compare_configs
from sdit.train.rundata import RunData


class RunState:
    """Weights, moments, EMA and clock of a run under any layout."""

    def __init__(
        self, run: ResolvedRun, engine: Engine, store: CheckpointStore, data: RunData, experts: ExpertParallel
    ) -> None:
        config = run.config
        self._run, self.config, self.engine, self.store = run, config, engine, store
        self.ema = Ema(engine.owned)
        self.experts, self.prior, self.data = (
            experts,
            PriorSchedule(config.prior, config.model, prior_law(config)),
            data,
        )
        self.clock = Clock()
        self.length_images = config.train.total_images
        self.last_batch = config.train.global_batch  # images of the newest step, perhaps of an earlier process
        stacks = (Experts, ShardedExperts)
        self._stacks = {name: module for name, module in engine.module.named_modules() if isinstance(module, stacks)}

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
        owned = self.engine.owned
        tensors: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: list[tuple[str, list[torch.Tensor]]] = [
            ("weight", [shard.master for shard in owned]),
            ("ema", self.ema.values),
        ]
        kinds += [(key, [shard.moment(key) for shard in owned]) for key in self.engine.moment_keys]
        for kind, values in kinds:
            more_tensors, more_shapes = collect(kind, owned, values, self.expert_ids)
            tensors |= more_tensors
            shapes |= more_shapes
        is_live = any(value.device.type == "cpu" for _, values in kinds for value in values)
        return Snapshot(self.clock.images_seen, tensors, shapes, self._facts(), is_live)

    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint over all ranks: masters, EMA and moments, four bytes each."""
        owned = sum(shard.numel for shard in self.engine.owned)
        box = torch.tensor([owned], dtype=torch.float64, device=self.engine.comm.device)
        return 4 * (2 + len(self.engine.moment_keys)) * int(self.engine.comm.sum(box).item())

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
        engine = self.engine
        return expert_state(engine.local, engine.owned, engine.moment_keys, self.ema.values, self.expert_ids)

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
        local, owned = self.engine.local, self.engine.owned
        with ShardSet(found.folder, manifest_files(found.manifest)) as shards, torch.no_grad():
            restore(shards, "weight", local, [shard.master for shard in local], self.expert_ids)
            restore(shards, "ema", owned, self.ema.values, self.expert_ids)
            for key in self.engine.moment_keys:
                restore(shards, key, local, [shard.moment(key) for shard in local], self.expert_ids)
        self.engine.sync_compute_weights()
        self.clock = Clock.from_json(found.manifest["clock"])
        self.engine.set_steps(self.clock.steps)
        stored = found.manifest
        self.prior.load(stored.get("prior_columns"), stored.get("prior_every_steps"), str(found.folder))
        return changes
