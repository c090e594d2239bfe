"""DeepSpeed's engine for the trainer: forward, backward, gradient norm, then step or skip."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdit.distributed.comm import Comm
from sdit.distributed.deepspeed_internals import (
    create_moments,
    import_muon_uncompiled,
    optimizer_backend,
    replica_group,
    replica_share,
    set_optimizer_steps,
)
from sdit.distributed.shards import MOMENTS, Shard, owned_shards
from sdit.transfers import upload


class Engine:
    """A training module under DeepSpeed.

    `local` are all shards of float32 state in this rank's memory. `owned` are the shards that this rank writes and averages.
    `frozen_local` and `frozen_owned` are the same of parameters that are not trained, which have masters only.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, deepspeed_config: dict[str, Any], comm: Comm
    ) -> None:
        import deepspeed

        _quiet_deepspeed()
        import_muon_uncompiled()
        self.comm = comm
        exact = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=None, config=deepspeed_config, dist_init_required=False
        )
        kinds = {group["kind"] for group in optimizer.param_groups}
        self._keep_float32(exact)
        self.moment_keys = tuple(key for kind in sorted(kinds) for key in MOMENTS[kind])
        create_moments(self.deepspeed)
        self.set_steps(0)  # DeepSpeed takes a step on zero gradients to create the moments (ZeRO 0 in bf16)
        self._backend = optimizer_backend(self.deepspeed)
        self.local = self._backend.shards()
        replicas = self._backend.replicas()
        self.owned = owned_shards(self.local, replicas)
        self._restore_exact_masters(exact)
        self.frozen_local = [self._frozen_shard(name, exact[name]) for name in sorted(self._frozen())]
        shares = {name: replica_share(parameter) for name, parameter in self._frozen().items()}
        self.frozen_owned = owned_shards(self.frozen_local, shares)
        self._replicated = {name for name, share in (*replicas.items(), *shares.items()) if share.count > 1}

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, the mean over the micro-batch.

        They are reduced over ranks at the last micro-step.
        """
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # DeepSpeed counts micro-steps here; the weights change only at the boundary

    def gradients(self) -> list[Tensor]:
        """Return the local reduced gradients."""
        return self._backend.gradients()

    def squared_gradient_norm(self) -> Tensor:
        """Return this rank's contribution to the squared global norm, a float64 scalar.

        It is not finite if any gradient is not finite.
        """
        gradients = self.gradients()
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.comm.device)
        norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float64))
        squares = self._backend.norm_shares() * norms * norms
        # On a CPU the order of a sum depends on the width of its vectors. In index order the bits are the same on any CPU.
        total = squares.sum() if squares.is_cuda else squares.cumsum(0)[-1]
        return upload(total, self.comm.device)

    def step(self, scale: float, learning_rates: dict[str, float]) -> None:
        """Multiply the gradients by `scale` (clipping) and update the weights with the `learning_rates` by group role."""
        if scale != 1.0:
            self._scale_gradients(scale)
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = learning_rates[group["role"]]
        self.deepspeed.step()

    def _scale_gradients(self, scale: float) -> None:
        on_gpu = self.comm.device.type == "cuda"
        # On a CPU a Python number would be rounded to bfloat16 before the product.
        factor = scale if on_gpu else torch.tensor(scale, dtype=torch.float64)
        if gradients := self.gradients():
            torch._foreach_mul_(gradients, factor)  # type: ignore[arg-type]

    def skip(self) -> None:
        """Discard the accumulated gradients. Weights and moments do not change."""
        self._backend.discard()
        self.deepspeed.micro_steps += 1

    def sync_compute_weights(self) -> None:
        """Copy the masters into the compute weights of each rank, after a load or a migration of experts."""
        self._backend.sync_compute_weights()
        parameters = self._frozen()
        for shard in self.frozen_local:
            parameters[shard.name].detach().copy_(shard.flat)

    def set_steps(self, steps: int) -> None:
        set_optimizer_steps(self.deepspeed, steps)

    @contextlib.contextmanager
    def weights_of(self, owned_values: Sequence[Tensor]) -> Iterator[None]:
        """Use other weights, such as the EMA, inside the `with`, then restore the weights.

        `owned_values` are one tensor per owned shard.
        """
        saved = [shard.master.clone() for shard in self.local]
        self.scatter_owned(owned_values)
        try:
            self.sync_compute_weights()
            yield
        finally:
            for shard, values in zip(self.local, saved, strict=True):
                shard.master.copy_(values)
            self.sync_compute_weights()

    def scatter_owned(self, owned_values: Sequence[Tensor]) -> None:
        """Write one tensor per owned shard into the masters of all ranks that have a replica of it."""
        for shard, values in zip(self.owned, owned_values, strict=True):
            shard.master.copy_(values)
        self.copy_to_replicas(self.local, self.owned, lambda shard: shard.master)

    def copy_to_replicas(
        self, local: Sequence[Shard], owned: Sequence[Shard], values_of: Callable[[Shard], Tensor]
    ) -> None:
        """Copy the owned values of each replicated parameter to the other ranks, bit for bit. All ranks call it together."""
        mine = {shard.name: shard for shard in owned}
        for shard in local:
            if shard.name not in self._replicated:
                continue
            own = mine.get(shard.name)
            box = torch.zeros_like(values_of(shard))
            if own is not None:
                box.narrow(0, own.start - shard.start, own.numel).copy_(values_of(own))
            # The owned ranges do not overlap. A sum of integers keeps all bits, also that of -0.0.
            group = replica_group(self.module.get_parameter(shard.name))
            torch.distributed.all_reduce(box.view(torch.int32), group=group)
            values_of(shard).copy_(box)

    def gather_from_replicas(self, parameter: str, value: Any) -> list[Any]:
        """Return the `value` of each rank with the same values of a parameter, in rank order (JSON types only)."""
        return self.comm.gather(value, replica_group(self.module.get_parameter(parameter)))

    def _restore_exact_masters(self, exact: dict[str, Tensor]) -> None:
        """Set the masters to the unrounded weights. In bf16 DeepSpeed creates them from rounded weights."""
        for shard in self.local:
            shard.master.copy_(exact[shard.name].view(-1).narrow(0, shard.start, shard.numel))

    def _keep_float32(self, exact: dict[str, Tensor]) -> None:
        """Undo DeepSpeed's cast of the untrained parameters that a module names in `float32_parameters`."""
        for prefix, each in self.module.named_modules():
            for name in getattr(each, "float32_parameters", ()):
                parameter = getattr(each, name)
                if parameter is not None:
                    parameter.data = exact[f"{prefix}.{name}"].to(parameter.device)

    def _frozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if not p.requires_grad}

    def _frozen_shard(self, name: str, exact: Tensor) -> Shard:
        """Return the shard of a whole parameter that is not trained. In float32 its master is the parameter itself."""
        parameter = self.module.get_parameter(name).detach()
        master = parameter if parameter.dtype == torch.float32 else exact.to(parameter.device)
        return Shard(name, tuple(master.shape), 0, master.numel(), master, 0, self.deepspeed.basic_optimizer)


def _quiet_deepspeed() -> None:
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
