"""The experts of a block, sharded over an expert-parallel group, as DeepSpeed expects them.

M experts, M_local local ones, P ranks of the group.
"""

from __future__ import annotations

import numpy as np
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from sdit.distributed.deepspeed_internals import expert_group_name, make_expert_groups
from sdit.model.moe.base import Experts
from sdit.transfers import upload


class ShardedExperts(nn.Module):
    """A layer around the local stack of experts. Gate and dispatch are sdit's.

    DeepSpeed finds its parameters (M_local, ...) by `allreduce = False` and `group_name`. `experts_of_rank` (P, M_local) are
    the global ids of the experts of each rank.
    """

    def __init__(self, local: Experts, count: int, ranks: int) -> None:
        nn.Module.__init__(self)  # not MoE's constructor, which would build token gates
        self.num_experts, self.ep_size, self.num_local_experts = count, ranks, count // ranks
        self.expert_group_name = expert_group_name(ranks)
        self._columns: Tensor | None = None
        self.experts_of_rank = np.arange(count).reshape(ranks, -1)
        self._local = (local,)  # not a submodule, so that the parameters keep the names of the model's experts
        for name, parameter in local.named_parameters(recurse=False):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    @property
    def local(self) -> Experts:
        """The experts that this process computes."""
        return self._local[0]

    @property
    def ids(self) -> tuple[int, ...]:
        """The global ids of the local experts, in the order of the parameters' rows."""
        return self.local.ids

    def place(self, experts_of_rank: np.ndarray, ep_rank: int) -> None:
        """Set the global ids (P, M_local) of the experts of each rank. `ep_rank` is this process's rank in the group.

        A new placement also moves the contents of the rows, see `migration`.
        """
        self.experts_of_rank, self.local.ids = experts_of_rank, tuple(experts_of_rank[ep_rank].tolist())
        order = torch.from_numpy(experts_of_rank.flatten())
        is_in_order = bool((order.diff() > 0).all())
        self._columns = None if is_in_order else upload(order, next(self.parameters()).device)

    def by_rank(self, values: Tensor) -> Tensor:
        """Return values (N, P, M_local) of the experts of each rank, for values (N, M) by global id. Differentiable."""
        ordered = values if self._columns is None else values.index_select(1, self._columns)
        return ordered.unflatten(1, (self.ep_size, self.num_local_experts))


class TrainedShardedExperts(ShardedExperts, MoE):
    """Sharded experts as DeepSpeed's engine finds them, by the type of its MoE layer.

    ZeRO reduces and partitions their parameters over the expert-data-parallel group. It refuses a model with such layers in
    which no expert is trained.
    """

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create DeepSpeed's groups, once for all layers. The engine calls this."""
        make_expert_groups(self.ep_size)


def expert_stacks(module: nn.Module) -> dict[str, Experts | ShardedExperts]:
    """Return the submodules of a network whose parameters have one row per expert, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, (Experts, ShardedExperts))}
