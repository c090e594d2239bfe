"""Forward passes of an expert-parallel group. Tokens are sent to the ranks of their experts, or expert weights to all ranks.

B local samples of n in the group, L tokens, D width, M experts of a block, M_local local ones, S rows sent, R received.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.contracts import ForwardPass, TaskView
from sdit.expert_parallel.all_to_all import ExpertGroup, Pending, begin_replicate, begin_rows, eagerly
from sdit.expert_parallel.device_plan import BlockDevicePlan, DevicePlan
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.model.moe.base import Experts
from sdit.model.moe.local import LocalDispatcher

BlockExperts = Experts | ShardedExperts


class Dispatched(NamedTuple):
    """A block whose transfers have begun. `arriving` is None if no rank of the group sends a row."""

    block: int
    z: Tensor
    gates: Tensor
    experts: Experts
    replicas: Mapping[str, Tensor]
    arriving: Pending | None


class Computed(NamedTuple):
    """A block's mixture `mixed` (B, L, D), as far as this rank computed it.

    `returning` is the transfer of the results from other ranks, or None.
    """

    block: int
    mixed: Tensor
    returning: Pending | None


class PlannedPass:
    """One forward and backward pass that follows the plan of a micro-step.

    If `prefetch` holds the experts of all blocks, the replicas of a block are sent while the previous block is computed.
    If it is empty, they are sent at the start of their block.
    """

    def __init__(self, group: ExpertGroup, plan: DevicePlan, prefetch: Sequence[BlockExperts] = ()) -> None:
        self.view = plan.view
        self._group, self._blocks, self._experts = group, plan.blocks, prefetch
        self._prefetched: tuple[int, Pending] | None = None

    @eagerly
    def dispatch(self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: BlockExperts) -> Dispatched:
        """Start to send tokens z (B, L, D) to the ranks of their experts, and receive the replicas of the block."""
        plan, arriving = self._blocks[block], None
        if plan.travels:
            rows = z.index_select(0, plan.send_rows)
            arriving = begin_rows(self._group, rows, plan.send_splits, plan.receive_splits)
        index = operator.index(block)
        return Dispatched(index, z, gates, experts.local, self._replicas(index, experts), arriving)

    @eagerly
    def compute(self, dispatched: Dispatched) -> Computed:
        """Compute the local rows, then the received rows, and start to send the results of the received rows back."""
        block, z, gates, experts, replicas, arriving = dispatched
        plan, returning = self._blocks[block], None
        local = experts.parameter_rows()
        mixed = experts.mix(z, plan.local.weights(gates), plan.local.rows, replicas, local)
        if arriving is not None:
            arrived = arriving.wait()
            served = experts.mix(arrived, plan.remote.weights(gates), plan.remote.rows, local=local)
            returning = begin_rows(self._group, served.to(arrived.dtype), plan.receive_splits, plan.send_splits)
        return Computed(block, mixed, returning)

    @eagerly
    def combine(self, computed: Computed) -> Tensor:
        """Return the mixture (B, L, D), and start to send the replicas of the next block.

        The replicas are sent here even if no row is sent. The order of backward must be the same in all groups, because it is
        the order of the gradients in ZeRO's buckets, and the routes of the groups differ.
        """
        block, mixed, returning = computed
        if returning is not None:
            mixed = mixed.index_add(0, self._blocks[block].send_rows, returning.wait().to(mixed.dtype))
        if block + 1 < len(self._experts):
            sent = self._replicate(self._experts[block + 1], self._blocks[block + 1])
            self._prefetched = None if sent is None else (block + 1, sent)
        return mixed

    def _replicas(self, block: int, experts: BlockExperts) -> Mapping[str, Tensor]:
        """Return the parameters (n, ...) by name of the replicated experts of other ranks."""
        if self._prefetched is not None:
            (sent_for, sent), self._prefetched = self._prefetched, None
            assert sent_for == block, f"replicas of block {sent_for} were sent, block {block} is computed"
        else:
            begun = self._replicate(experts, self._blocks[block])
            if begun is None:
                return {}
            sent = begun
        return experts.local.unflatten_rows(sent.wait())

    def _replicate(self, experts: BlockExperts, plan: BlockDevicePlan) -> Pending | None:
        """Start to exchange the weights of all replicated experts. Return None if there are none."""
        if not sum(plan.replica_counts) or self._group.ranks == 1:
            return None
        return begin_replicate(self._group, experts.local.flat_rows(plan.replica_rows), plan.replica_counts)


class SharedTaskPass:
    """A forward pass without gradient in which all samples of the group have the same task, as in sampling."""

    def __init__(self, group: ExpertGroup, task: Tensor) -> None:
        assert len(task) == 1 or task.stride(0) == 0, "sharded experts sample with one time for all samples"
        self.view = TaskView(task=task[:1], own=torch.zeros(len(task), dtype=torch.int64, device=task.device))
        self._group = group

    def dispatch(
        self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: BlockExperts
    ) -> tuple[Tensor, Tensor, Experts]:
        """Return the tokens, the gates of the local experts, and the experts. No data are sent yet."""
        own = torch.tensor(experts.ids, device=gates.device)
        return z, gates[:, own], experts.local

    def compute(self, dispatched: tuple[Tensor, Tensor, Experts]) -> Tensor:
        """Return the mixture (B, L, D).

        Linear experts are merged on their ranks, and the merged weights are summed over the group. For other experts, each rank
        receives the tokens of all ranks.
        """
        z, gates, experts = dispatched
        merged = experts.merge(gates)
        if merged is not None:
            dist.all_reduce(merged, group=self._group.process_group)
            return experts.apply_merged(z, merged)
        everyone = [torch.empty_like(z) for _ in range(self._group.ranks)]
        dist.all_gather(everyone, z.contiguous(), group=self._group.process_group)
        mixed = torch.cat([experts(tokens, gates) for tokens in everyone])
        dist.all_reduce(mixed, group=self._group.process_group)
        rows = len(z)
        return mixed[self._group.ep_rank * rows : (self._group.ep_rank + 1) * rows]

    def combine(self, computed: Tensor) -> Tensor:
        """Return the mixture (B, L, D) unchanged."""
        return computed


def shared_task_pass(group: ExpertGroup, task: Tensor) -> ForwardPass:
    """Return the pass of samples that share one task: local if this rank owns all experts."""
    return SharedTaskPass(group, task) if group.ranks > 1 else LocalDispatcher().forward_pass(task)
