"""The run with all its settings resolved: config, merged DeepSpeed JSON, batch plan and EP.

Each process computes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdit.config.deepspeed_json import merge_deepspeed, zero_stage
from sdit.config.schema import Config
from sdit.errors import ConfigError
from sdit.topology import BatchPlan, choose_expert_parallel, common_ranks_per_node, plan_batch


@dataclass(frozen=True)
class ResolvedRun:
    """A run on `world` ranks. `deepspeed` is the merged JSON. `expert_parallel` is EP, the ranks of an expert group."""

    config: Config
    deepspeed: dict[str, Any]
    batch: BatchPlan
    expert_parallel: int
    world: int
    zero_stage: int

    def describe(self) -> str:
        """Return the batch equation and the layout, as in the first line that a run prints."""
        batch, parallel = self.batch, self.config.parallel
        layout = f"EP {self.expert_parallel}, ZeRO {self.zero_stage}, {self.config.train.precision}"
        exchange = f", exchange {parallel.exchange}" if self.expert_parallel > 1 else ""
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        equation = f"global batch {batch.global_batch} = {ranks} x {batch.micro_batch} x {batch.accumulation}"
        return f"{equation} (ranks x micro-batch x accumulation); {layout}{exchange}"

    def on_nodes(self, local_worlds: Sequence[int]) -> ResolvedRun:
        """Return the run on nodes that may differ. `local_worlds` has for each rank the number of ranks of its node.

        A rank resolves the run by its own node. The ranks must agree on EP before they make groups.
        """
        size = _expert_parallel(self.config, self.world, common_ranks_per_node(local_worlds))
        return replace(self, expert_parallel=size)


def resolve_run(config: Config, deepspeed: dict[str, Any], source: str, world: int, ranks_per_node: int) -> ResolvedRun:
    """Return the run on `world` ranks. `deepspeed` is the JSON that was read from `source`.

    Raises: ConfigError: if the config cannot run on this number of ranks, or the JSON disagrees with it.
    """
    batch = plan_batch(config.train.global_batch, config.train.micro_batch, world)
    merged = merge_deepspeed(config, batch, deepspeed, source)
    stage = zero_stage(merged, source)
    if config.optimizer.kind == "muon" and stage > 0:
        raise ConfigError(
            f"optimizer.kind: muon needs whole matrices on each rank, and {source} has zero_optimization.stage {stage}; "
            "legal: adamw, or stage 0"
        )
    size = _expert_parallel(config, world, ranks_per_node)
    return ResolvedRun(config, merged, batch, size, world, stage)


def check_trainable(config: Config) -> None:
    """Check the config as far as possible without torch and data.

    Raises: ConfigError: if the run cannot be trained.
    """
    if config.diffusion.path == "flow" and config.model.learn_variance:
        raise ConfigError("model.learn_variance: true has no meaning with diffusion.path flow; legal: false")
    if config.train.steps is None and config.train.images is None:
        raise ConfigError("train.steps: is not set; legal: train.steps or train.images, the length of the run")
    if config.train.init_code is not None and (config.diffusion.path, config.model.time_scale) != ("flow", 1.0):
        raise ConfigError(
            f"train.init_code: {config.train.init_code} with diffusion.path {config.diffusion.path} and model.time_scale "
            f"{config.model.time_scale}; legal: flow and 1, or train.init_code null"
        )
    if config.diffusion.path == "diffusion" and config.sample.time_shift != 1:
        raise ConfigError(f"sample.time_shift: {config.sample.time_shift:g} with diffusion.path diffusion; legal: 1")
    guided = config.sample.guided_channels
    if guided is not None and guided > config.model.channels:
        raise ConfigError(
            f"sample.guided_channels: {guided} is more than model.channels; legal: 1..{config.model.channels}"
        )


def largest_world(config: Config, ranks: int) -> int:
    """Return the largest number of ranks, up to `ranks`, that the config can run on, or 0 if there is none."""
    for world in range(ranks, 0, -1):
        try:
            plan_batch(config.train.global_batch, config.train.micro_batch, world)
            _expert_parallel(config, world, world)
        except ConfigError:
            continue
        return world
    return 0


def _expert_parallel(config: Config, world: int, ranks_per_node: int) -> int:
    """Return EP, which divides the experts of each kind. It is 1 for models without experts."""
    model = config.model
    if model.variant != "switch" and model.moe is None:
        return 1
    return choose_expert_parallel(config.parallel.expert, model.common_experts, world, ranks_per_node)
