"""The dispatcher of token-routed experts that every rank has all of: data parallelism. M experts."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sdit.model.moe.token_local import LocalTokenDispatcher, LocalTokenPass


class ReplicatedTokenPass(LocalTokenPass):
    """A pass of one of several ranks. Tokens stay on their rank, and the choices of all ranks are counted."""

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """Return int64 counts, summed over all ranks. The host does not wait for them."""
        return sum_over_ranks(counts)


class ReplicatedTokenDispatcher(LocalTokenDispatcher):
    """The dispatcher of a rank that has all experts, as the other ranks do."""

    def forward_pass(self) -> ReplicatedTokenPass:
        """Return a new pass."""
        return ReplicatedTokenPass()


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Return counts, summed over all ranks of the run. The host of a GPU does not wait for them."""
    summed = counts.clone()
    dist.all_reduce(summed)
    return summed
