"""The partition of a run's parameters over ranks: the groups that DeepSpeed flattens, from the model on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from sdit.config import Config, ResolvedRun, resolve_run
from sdit.config.deepspeed_json import offloads_optimizer, uses_bf16_optimizer
from sdit.diffusion import build_objective
from sdit.model import DiffusionTransformer, ParameterCount, build_model, count_parameters
from sdit.model.freezing import freeze
from sdit.model.moe.base import Experts
from sdit.topology import BatchPlan

DeviceKind = Literal["cuda", "cpu"]
DEFAULT_BUCKET_NUMEL = 500_000_000  # DeepSpeed's reduce_bucket_size
ALIGNMENT = 2  # DeepSpeed pads a flattened group to a multiple of this x the ranks that share it


@dataclass(frozen=True)
class Group:
    """Parameters whose optimizer state is partitioned over `ranks` ranks. `numels` are their sizes, in order.

    `experts` is True for sharded experts.
    """

    numels: tuple[int, ...]
    ranks: int
    experts: bool

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def padded(self) -> int:
        """The number of elements of the flattened group, with padding."""
        step = ALIGNMENT * self.ranks
        return -(-self.numel // step) * step

    @property
    def partition_numel(self) -> int:
        """The number of elements of one rank's partition."""
        return self.padded // self.ranks

    def overlapping(self, index: int) -> int:
        """Return the elements of all parameters that overlap partition `index`.

        Their gradients are kept whole.
        """
        low, high = index * self.partition_numel, (index + 1) * self.partition_numel
        ends = accumulate(self.numels)
        return sum(numel for numel, end in zip(self.numels, ends, strict=True) if end - numel < high and end > low)

    def unpadded(self, index: int) -> int:
        """Return the elements of partition `index` without padding."""
        return max(0, min(self.numel, (index + 1) * self.partition_numel) - index * self.partition_numel)


@dataclass(frozen=True)
class Job:
    """A config on `world` ranks with `per_node` ranks per node under a ZeRO stage: the input of all estimates.

    `groups` are the trained parameters, `frozen` those of `train.freeze`, which have no optimizer state.
    `keeps_gradients` is True under DeepSpeed's BF16_Optimizer. It keeps all gradients in float32 for the whole run, and has no
    bucket.
    """

    config: Config
    world: int
    per_node: int
    stage: int
    offload: bool
    keeps_gradients: bool
    bucket_numel: int
    bucket_count: int
    batch: BatchPlan
    expert_parallel: int
    groups: tuple[Group, ...]
    frozen: tuple[Group, ...]
    parameters: ParameterCount

    @property
    def element_bytes(self) -> int:
        """The bytes of one compute weight."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def numel(self) -> int:
        """The number of parameters that one rank trains."""
        return sum(group.numel for group in self.groups)

    @property
    def frozen_numel(self) -> int:
        """The number of parameters that one rank computes with and does not train."""
        return sum(group.numel for group in self.frozen)


def plan_job(config: Config, deepspeed: dict[str, Any], source: str, world: int, per_node: int) -> Job:
    """Return the job of a config.

    Raises: ConfigError: if the config cannot run on this number of ranks, or the JSON contradicts it.
    """
    return job_of_run(resolve_run(config, deepspeed, source, world, per_node), per_node)


def job_of_run(run: ResolvedRun, per_node: int) -> Job:
    """Return the job of a run with `per_node` ranks per node. Raises: ConfigError: if `train.freeze` does not fit the model."""
    config, world, zero = run.config, run.world, run.deepspeed["zero_optimization"]
    model = build_model(config.model, device="meta")
    freeze(model, config.train.freeze)
    objective = build_objective(config.diffusion, config.model.timesteps)
    learned = tuple(parameter.numel() for parameter in objective.parameters())
    groups = list(_model_groups(model, world, run.expert_parallel, True))
    groups += [Group(learned, world, False)] if learned else []
    return Job(
        config=config,
        world=world,
        per_node=per_node,
        stage=run.zero_stage,
        offload=offloads_optimizer(run.deepspeed),
        keeps_gradients=uses_bf16_optimizer(run.deepspeed),
        bucket_numel=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_NUMEL)),
        bucket_count=2 if zero.get("overlap_comm", False) else 1,
        batch=run.batch,
        expert_parallel=run.expert_parallel,
        groups=tuple(groups),
        frozen=tuple(_model_groups(model, world, run.expert_parallel, False)),
        parameters=count_parameters(model),
    )


def _model_groups(model: DiffusionTransformer, world: int, expert_parallel: int, trained: bool) -> Iterator[Group]:
    """Yield the group of dense parameters and, if experts are sharded, that of the local experts, shared by fewer ranks.

    They are the parameters that are `trained`, or those that are not.
    """
    dense, local = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != trained:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if expert_parallel > 1 and isinstance(owner, Experts):
            local.append(parameter.numel() // expert_parallel)
        else:
            dense.append(parameter.numel())
    if dense:
        yield Group(tuple(dense), world, False)
    if local:
        yield Group(tuple(local), world // expert_parallel, True)
