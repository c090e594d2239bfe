"""DeepSpeed's engine as the trainer sees it: forward, backward, one look at the gradients, then step or skip."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdit.parallel.comm import Comm
from sdit.parallel.experts import expert_group_of
from sdit.parallel.state import MOMENTS, create_moments, held_pieces, owned_pieces, set_optimizer_steps


class Engine:
    """A training module under DeepSpeed. State is reached through `held` (all this rank has) and `owned` (its share)."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        deepspeed_config: dict[str, Any],
        comm: Comm,
        kind: str,
    ) -> None:
        import deepspeed

        _quiet_deepspeed()
        self.comm = comm
        exact = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=None, config=deepspeed_config, dist_init_required=False
        )
        self.moment_keys = MOMENTS[kind]
        create_moments(self.deepspeed, self.moment_keys)
        self.held = held_pieces(self.deepspeed)
        self.owned = owned_pieces(self.held, self._replicas())
        self._restore_exact_masters(exact)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss` (mean over the micro-batch); reduced over ranks at the last micro-step."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # DeepSpeed counts micro-steps here; the weights move at the boundary only

    def gradients(self) -> list[tuple[Tensor, float]]:
        """This rank's reduced gradients with the share of the global squared norm that each is counted for here."""
        wrapper, replicas = self.deepspeed.optimizer, self._replicas()
        kind = type(wrapper).__name__
        if kind == "DeepSpeedZeroOptimizer":
            if wrapper.cpu_offload:
                return [(flat.grad, 1.0) for flat in wrapper.single_partition_of_fp32_groups if flat.grad is not None]
            parts = [gradient for group in wrapper.averaged_gradients.values() for gradient in group or []]
            return [(gradient, 1.0) for gradient in parts if gradient is not None]
        if kind == "BF16_Optimizer":
            return [(gradient, 1.0) for gradient in wrapper.fp32_groups_gradient_flat_partition]
        return [
            (parameter.grad, 1.0 / replicas[name][1])
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        ]

    def squared_gradient_norm(self) -> Tensor:
        """float64 scalar: this rank's part of the squared global norm; non-finite if any gradient is."""
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for gradient, share in self.gradients():
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64).to(self.comm.device)
            total += share * norm * norm
        return total

    def step(self, scale: float, learning_rates: dict[str, float]) -> None:
        """Multiply the gradients by `scale` (clipping) and move the weights; `learning_rates` by group role."""
        if scale != 1.0:
            for gradient, _ in self.gradients():
                gradient.mul_(scale)
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = learning_rates[group["role"]]
        self.deepspeed.step()

    def skip(self) -> None:
        """Throw the accumulated gradients away and leave weights and moments as they are."""
        engine, wrapper = self.deepspeed, self.deepspeed.optimizer
        kind = type(wrapper).__name__
        if kind == "DeepSpeedZeroOptimizer":
            wrapper.zero_grad(set_to_none=True)
            wrapper._release_preflattened_grad_buffers()
            wrapper.micro_step_id = -1
            if wrapper.cpu_offload:
                wrapper.reset_cpu_buffers()
            else:
                for key in wrapper.averaged_gradients:
                    wrapper.averaged_gradients[key] = None
                    wrapper.all_grad_tensors[key] = None
        elif kind == "BF16_Optimizer":
            wrapper.clear_hp_grads()
            wrapper.clear_lp_grads()
        else:
            for parameter in self.module.parameters():
                parameter.grad = None
        engine.micro_steps += 1

    def publish_masters(self) -> None:
        """Copy the masters into the compute weights of every rank (after a load)."""
        wrapper = self.deepspeed.optimizer
        if hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
            return
        parameters = dict(self.module.named_parameters())
        for piece in self.held:
            compute = parameters[piece.name].detach()
            if compute.data_ptr() != piece.master.data_ptr():
                compute.view(-1).narrow(0, piece.start, piece.numel).copy_(piece.master)

    def set_steps(self, steps: int) -> None:
        set_optimizer_steps(self.deepspeed, steps)

    @contextlib.contextmanager
    def weights_of(self, owned_values: Sequence[Tensor]) -> Iterator[None]:
        """Compute with other weights (such as the EMA; one tensor per owned piece) inside the `with`, then go back."""
        saved = [piece.master.clone() for piece in self.held]
        self.scatter_owned(owned_values)
        try:
            self.publish_masters()
            yield
        finally:
            for piece, values in zip(self.held, saved, strict=True):
                piece.master.copy_(values)
            self.publish_masters()

    def scatter_owned(self, owned_values: Sequence[Tensor]) -> None:
        """Write one tensor per owned piece into the masters, on every rank that holds a replica of it."""
        for piece, values in zip(self.owned, owned_values, strict=True):
            piece.master.copy_(values)
        if len(self.owned) != len(self.held) or any(
            o.numel != h.numel for o, h in zip(self.owned, self.held, strict=True)
        ):
            self._share_replicas()

    def _share_replicas(self) -> None:
        """ZeRO 0: give every rank the parts of each replicated master that the others own."""
        mine = {(piece.name): piece for piece in self.owned}
        for piece in self.held:
            box = torch.zeros_like(piece.master)
            own = mine.get(piece.name)
            if own is not None:
                box.narrow(0, own.start - piece.start, own.numel).copy_(own.master)
            torch.distributed.all_reduce(box, group=self._replica_group(piece.name))
            piece.master.copy_(box)

    def _restore_exact_masters(self, exact: dict[str, Tensor]) -> None:
        """bf16: DeepSpeed makes masters from the rounded weights; start from the unrounded ones instead."""
        for piece in self.held:
            piece.master.copy_(exact[piece.name].view(-1).narrow(0, piece.start, piece.numel))

    def _replicas(self) -> dict[str, tuple[int, int]]:
        """name -> (this rank's index, count) among the ranks that hold the same fp32 state of a parameter."""
        if hasattr(self.deepspeed.optimizer, "real_dp_process_group"):
            return {name: (0, 1) for name, _ in self.module.named_parameters()}
        result = {}
        for name, _ in self.module.named_parameters():
            group = self._replica_group(name)
            result[name] = (torch.distributed.get_rank(group), torch.distributed.get_world_size(group))
        return result

    def _replica_group(self, name: str) -> Any:
        from deepspeed.utils import groups

        name_of_group = expert_group_of(self.module.get_parameter(name))
        if name_of_group is not None:
            return groups._get_expert_data_parallel_group(name_of_group)
        return torch.distributed.group.WORLD


def _quiet_deepspeed() -> None:
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
