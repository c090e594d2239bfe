"""All uses of DeepSpeed beyond its public interface. A new DeepSpeed release affects only this file.

DeepSpeed keeps float32 masters and moments in one of four places, which depend on ZeRO stage, precision and offload.
An `OptimizerBackend` hides the difference from EMA, checkpoints, gradient norms and the migration of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdit.distributed.shards import MOMENTS, ReplicaShare, Shard


class OptimizerBackend:
    """Access to the float32 state of an engine. The base class is for state that is partitioned over the ranks."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._wrapper = engine, engine.optimizer
        self._names: dict[nn.Parameter, str] = {p: name for name, p in engine.module.named_parameters()}

    def shards(self) -> list[Shard]:
        """Return the shards of float32 state in this rank's memory, sorted by parameter name and start."""
        return sorted(self._find(), key=lambda shard: (shard.name, shard.start))

    def gradients(self) -> list[Tensor]:
        """Return the local reduced gradients."""
        raise NotImplementedError

    def norm_shares(self) -> Tensor | float:
        """Return the fraction of the squared norm of each gradient that this rank adds to the global sum."""
        return 1.0

    def discard(self) -> None:
        """Discard the accumulated gradients."""
        raise NotImplementedError

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights of each rank."""
        self._wrapper.update_lp_params()

    def replicas(self) -> dict[str, ReplicaShare]:
        """Return, for each parameter, this rank's share among the ranks with the same float32 state."""
        return {name: ReplicaShare(0, 1) for name in self._names.values()}

    def _find(self) -> Iterator[Shard]:
        raise NotImplementedError

    def _partitions(self, groups: Any, flats: Any) -> Iterator[Shard]:
        """Yield the shards of ZeRO partitions. DeepSpeed links each parameter to its range of the flat float32 partition."""
        for group, flat in zip(groups, flats, strict=True):
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    local, master = link.lp_fragment_address, link.hp_fragment_address
                    shape, optimizer = tuple(parameter.shape), self._engine.basic_optimizer
                    yield Shard(self._names[parameter], shape, local.start, local.numel, flat, master.start, optimizer)


class NoZero(OptimizerBackend):
    """ZeRO 0: each rank has all state. In float32 the parameters are the masters. In bf16 the wrapper has copies."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        replicas = self.replicas()
        self._shares = {p: 1.0 / replicas[name].count for p, name in self._names.items()}
        self._norm_shares = torch.empty(0, dtype=torch.float64)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._names if p.grad is not None]

    def norm_shares(self) -> Tensor:
        shares = [share for p, share in self._shares.items() if p.grad is not None]
        if len(shares) != len(self._norm_shares):  # a parameter has a gradient in every step, or in none
            self._norm_shares = torch.tensor(shares, dtype=torch.float64, device=self._engine.device)
        return self._norm_shares

    def discard(self) -> None:
        for parameter in self._names:
            parameter.grad = None

    def sync_compute_weights(self) -> None:
        parameters = {name: parameter for parameter, name in self._names.items()}
        for shard in self.shards():
            compute = parameters[shard.name].detach()
            if compute.data_ptr() != shard.master.data_ptr():
                compute.view(-1).narrow(0, shard.start, shard.numel).copy_(shard.master)

    def replicas(self) -> dict[str, ReplicaShare]:
        return {name: replica_share(parameter) for parameter, name in self._names.items()}

    def _find(self) -> Iterator[Shard]:
        basic = self._engine.basic_optimizer
        if self._wrapper is basic:
            pairs = [(p, p) for group in basic.param_groups for p in group["params"]]
        else:
            groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True)
            pairs = [pair for each in groups for pair in zip(*each, strict=True)]
        for parameter, master in pairs:
            yield Shard(self._names[parameter], tuple(parameter.shape), 0, parameter.numel(), master, 0, basic)


class Bf16Partitions(OptimizerBackend):
    """`BF16_Optimizer`: ZeRO 1 in bf16, with float32 gradients in flat partitions."""

    def gradients(self) -> list[Tensor]:
        return list(self._wrapper.fp32_groups_gradient_flat_partition)

    def discard(self) -> None:
        self._wrapper.clear_hp_grads()
        self._wrapper.clear_lp_grads()

    def _find(self) -> Iterator[Shard]:
        return self._partitions(self._wrapper.bf16_groups, self._wrapper.fp32_groups_flat_partition)


class ZeroPartitions(OptimizerBackend):
    """`DeepSpeedZeroOptimizer`: ZeRO 1 and 2 on the device."""

    def gradients(self) -> list[Tensor]:
        found = [gradient for group in self._wrapper.averaged_gradients.values() for gradient in group or []]
        return [gradient for gradient in found if gradient is not None]

    def discard(self) -> None:
        self._wrapper.zero_grad(set_to_none=True)
        self._wrapper._release_preflattened_grad_buffers()
        self._wrapper.micro_step_id = -1
        self._drop_reduced()

    def _drop_reduced(self) -> None:
        for key in self._wrapper.averaged_gradients:
            self._wrapper.averaged_gradients[key] = None
            self._wrapper.all_grad_tensors[key] = None

    def _find(self) -> Iterator[Shard]:
        return self._partitions(self._wrapper.bit16_groups, self._wrapper.single_partition_of_fp32_groups)


class OffloadedZeroPartitions(ZeroPartitions):
    """`DeepSpeedZeroOptimizer` with state on the host. Its gradients are those of the host's partitions."""

    def gradients(self) -> list[Tensor]:
        self._wrapper._wait_for_offload_copies()  # copies to pinned memory are asynchronous
        flats = self._wrapper.single_partition_of_fp32_groups
        return [flat.grad for flat in flats if flat.grad is not None]

    def _drop_reduced(self) -> None:
        self._wrapper.reset_cpu_buffers()


def optimizer_backend(engine: Any) -> OptimizerBackend:
    """Return the backend of a DeepSpeed engine."""
    wrapper = engine.optimizer
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer":
        return (OffloadedZeroPartitions if wrapper.cpu_offload else ZeroPartitions)(engine)
    if kind == "BF16_Optimizer":
        return Bf16Partitions(engine)
    assert wrapper is engine.basic_optimizer or kind == "FP16_UnfusedOptimizer", f"unknown optimizer wrapper: {kind}"
    return NoZero(engine)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer, of which ZeRO asks the type, without torch.compile.

    Its decorators would import the whole compiler: 2 s of CPU in every rank. No run computes with this optimizer.
    """
    from deepspeed.runtime import compiler

    compile_kernels, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = compile_kernels


def make_expert_groups(ranks: int) -> Any:
    """Create DeepSpeed's expert groups of `ranks` consecutive ranks, if they do not exist. Return this rank's group."""
    from deepspeed.utils import groups

    name = expert_group_name(ranks)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ranks)
    return groups._get_expert_parallel_group(name)


def expert_group_name(ranks: int) -> str:
    """Return DeepSpeed's name of the expert groups of `ranks` ranks."""
    return f"ep_size_{ranks}"


def expert_group_of(parameter: nn.Parameter) -> str | None:
    """Return the name of the expert groups of a sharded parameter, or None for a parameter that all ranks share."""
    return None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name")  # noqa: B009


def replica_group(parameter: nn.Parameter) -> Any:
    """Return the process group of the ranks with the same values of a parameter."""
    from deepspeed.utils import groups

    name = expert_group_of(parameter)
    return dist.group.WORLD if name is None else groups._get_expert_data_parallel_group(name)


def replica_share(parameter: nn.Parameter) -> ReplicaShare:
    """Return this rank's share among the ranks with the same values of a parameter."""
    group = replica_group(parameter)
    return ReplicaShare(dist.get_rank(group), dist.get_world_size(group))


def create_moments(engine: Any) -> None:
    """Create the optimizer's moments as zeros. torch creates them at the first step, but a load needs them earlier.

    A fused optimizer counts its steps on the device.
    """
    basic = engine.basic_optimizer
    for group in basic.param_groups:
        keys = MOMENTS[group["kind"]]
        for flat in group["params"]:
            if keys and not basic.state[flat]:
                device = flat.device if group.get("fused") else torch.device("cpu")
                steps = {"step": torch.zeros((), dtype=torch.float32, device=device)}
                basic.state[flat] = steps if "exp_avg" in keys else {}
                for key in keys:
                    basic.state[flat][key] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Set the step count of AdamW's bias correction."""
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))
