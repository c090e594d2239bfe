"""A block's experts spread over an expert-parallel group, in the form DeepSpeed looks for. M experts, M_local held here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from sdit.model.moe.experts import Experts


class SpreadExperts(MoE):
    """DeepSpeed's MoE layer holding the local stack of experts; gate and dispatch are ours.

    The engine finds the layer by its type, and its parameters (M_local, ...) by `allreduce = False` and `group_name`: they are
    reduced over the expert-data-parallel group and partitioned over it by ZeRO. MoE's own constructor would build token gates.
    """

    def __init__(self, local: Experts, count: int, ranks: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.num_local_experts = count, ranks, count // ranks
        self.expert_group_name = f"ep_size_{ranks}"
        self.enable_expert_tensor_parallelism = self.use_residual = False
        self._local = (local,)  # hidden from the module tree, so that parameters keep the names of the model's experts
        for name, parameter in local.named_parameters(recurse=False):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine: DeepSpeed's groups, made once for all layers."""
        make_expert_groups(self.ep_size)

    @property
    def local(self) -> Experts:
        return self._local[0]

    @property
    def ids(self) -> tuple[int, ...]:
        """Global ids of the experts held here, in the order of the parameters' rows."""
        return self.local.ids

    def set_ids(self, ids: Sequence[int]) -> None:
        """Name the rows anew, after a re-placement moved their contents."""
        self.local.ids = tuple(ids)

    def each(self, **parameters: Tensor) -> list[Callable[[Tensor], Tensor]]:
        return self.local.each(**parameters)

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:  # type: ignore[override]
        """(B, L, D) of the local experts alone, for gates (B, M_local)."""
        mixed: Tensor = self.local(z, gates)
        return mixed


def make_expert_groups(ranks: int) -> None:
    """Create DeepSpeed's expert groups of `ranks` consecutive ranks, if they do not exist."""
    if f"ep_size_{ranks}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ranks)


def expert_group_of(parameter: nn.Parameter) -> str | None:
    """Name of the expert group that a spread parameter belongs to; None for one that all ranks share."""
    return None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name")  # noqa: B009


def flat_rows(experts: Experts | SpreadExperts, rows: Tensor) -> Tensor:
    """(n, F) parameters of the experts in `rows` (n,), one expert a row, differentiable."""
    return torch.cat(
        [p.index_select(0, rows).flatten(1) for _, p in sorted(experts.named_parameters(recurse=False))], dim=1
    )


def unflatten_rows(experts: Experts | SpreadExperts, flat: Tensor) -> dict[str, Tensor]:
    """Parameters (n, ...) by name of experts (n, F) that were flattened by `flat_rows`."""
    named = sorted(experts.named_parameters(recurse=False))
    parts = flat.split([p[0].numel() for _, p in named], dim=1)
    return {name: part.reshape(len(flat), *p.shape[1:]) for (name, p), part in zip(named, parts, strict=True)}
