"""The plan of a micro-step: the samples that a rank loads, sends, receives and computes. It is made before block 0 runs.

N samples of the global batch, n = P * B of one group and micro-step, P ranks with B samples each, k experts used.
Each array depends only on integers that all ranks know. The plans of a group are therefore consistent without a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.expert_parallel.assignment import SampleExchange, assign_samples, plan_sample_exchange
from sdit.expert_parallel.placement import ExpertPlacement, path_need, ranks_needed
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.traffic_model import AssignmentKind
from sdit.topology import BatchPlan, ExpertGroups


@dataclass(frozen=True)
class ExpertWork:
    """The rows of a buffer and the (row, expert) pairs to compute on them, sorted by expert, then row.

    `samples` (R,) is the index in the group of each row. `pair_rows` and `pair_experts` are (E,).
    """

    samples: np.ndarray
    pair_rows: np.ndarray
    pair_experts: np.ndarray


@dataclass(frozen=True)
class BlockPlan:
    """One rank's exchange in one block.

    `send_rows` (S,): local rows by destination, then row. A row is sent once per destination, for all experts that it uses
    there. `send_splits`, `receive_splits` (P,): rows to and from each rank. `local`: the work on local rows for local or
    replicated experts. `remote`: the work on received rows, which are ordered by source, then row. Results are returned in
    the order of receipt, so they are added at `send_rows`. `travels`: True if any rank of the group sends a row.
    """

    send_rows: np.ndarray
    send_splits: np.ndarray
    receive_splits: np.ndarray
    local: ExpertWork
    remote: ExpertWork
    travels: bool


@dataclass(frozen=True)
class MicroStepPlan:
    """One rank's plan of one micro-step.

    `positions` (n,): the group's samples as positions in the global batch, in the order of the ranks that compute them.
    `tasks` (n,): their tasks. `own`: the slice of this rank. `experts` and `kept`: (depth, n, k). `kept` is None without
    drops. `sample_exchange` is None if each sample is computed where it was loaded. `blocks` (depth) hold the exchange of
    tokens.
    """

    positions: np.ndarray
    tasks: np.ndarray
    own: slice
    experts: np.ndarray
    kept: np.ndarray | None
    sample_exchange: SampleExchange | None
    blocks: tuple[BlockPlan, ...]


@dataclass(frozen=True)
class StepSamples:
    """The global batch of a step: run index of its first sample, gate tasks (N,), and `kept` (depth, N, k) or None (dropless)."""

    first_index: int
    tasks: np.ndarray
    kept: np.ndarray | None = None


@dataclass(frozen=True)
class RankBatch:
    """The part of one rank in every step: how the global batch is divided, the expert groups, and the rank."""

    batch: BatchPlan
    groups: ExpertGroups
    rank: int

    def group_positions(self, micro_step: int, first_index: int) -> np.ndarray:
        """Return the ascending positions (n,) in the global batch that the rank's group loads in one micro-step.

        A micro-step is a contiguous range of the batch. Run index `first_index` + position is loaded by the rank with this
        index modulo W.
        """
        chunk = np.arange(micro_step * self.batch.chunk, (micro_step + 1) * self.batch.chunk)
        group = (first_index + chunk) % self.groups.world // self.groups.size
        return chunk[group == self.groups.group_of(self.rank)]


def plan_micro_step(
    routes: RoutingTable, step: StepSamples, placement: ExpertPlacement, rank_batch: RankBatch, micro_step: int,
    assignment: AssignmentKind = "path",
) -> MicroStepPlan:  # fmt: skip
    """Return the plan of one rank for one micro-step of the global batch."""
    micro_batch, groups, tasks = rank_batch.batch.micro_batch, rank_batch.groups, step.tasks
    positions = rank_batch.group_positions(micro_step, step.first_index)
    source_rank = (step.first_index + positions) % groups.size
    ep_rank, ranks = groups.ep_rank_of(rank_batch.rank), groups.size
    assigned_rank = source_rank
    if assignment == "path" and ranks > 1 and not placement.replicated.all():
        present, present_index = np.unique(tasks[positions], return_inverse=True)
        need = path_need(routes.experts[:, present], placement)
        assigned_rank = assign_samples(present_index, need, micro_batch, source_rank)
    ordered = positions[np.argsort(assigned_rank, kind="stable")]
    experts = routes.experts[:, tasks[ordered]]
    group_kept = None if step.kept is None else step.kept[:, ordered]
    stays = bool((assigned_rank == source_rank).all())
    return MicroStepPlan(
        positions=ordered,
        tasks=tasks[ordered],
        own=slice(ep_rank * micro_batch, (ep_rank + 1) * micro_batch),
        experts=experts,
        kept=group_kept,
        sample_exchange=None if stays else plan_sample_exchange(source_rank, assigned_rank, ranks, ep_rank),
        blocks=plan_blocks(experts, group_kept, placement, ep_rank),
    )


def plan_blocks(
    experts: np.ndarray, kept: np.ndarray | None, placement: ExpertPlacement, ep_rank: int
) -> tuple[BlockPlan, ...]:
    """Return the exchange of one rank in each block.

    `experts` (depth, n, k) are those of the group's samples in the order of their ranks.
    """
    depth, samples, _ = experts.shape
    per_rank = samples // placement.ranks
    own = slice(ep_rank * per_rank, (ep_rank + 1) * per_rank)
    needed = ranks_needed(experts, placement, kept)
    needed[:, np.arange(samples), np.arange(samples) // per_rank] = False
    sends = needed[:, own].transpose(0, 2, 1)
    receives = needed[:, :, ep_rank]
    block = np.arange(depth)[:, None, None]
    mine, replicated = placement.expert_to_rank[block, experts] == ep_rank, placement.replicated[block, experts]
    if kept is not None:
        mine, replicated = mine & kept, replicated & kept
    local = np.zeros(experts.shape, dtype=bool)
    local[:, own] = (mine | replicated)[:, own]
    local_work = _work(experts, local)
    remote_work = _work(experts, mine & ~replicated & receives[:, :, None])
    send_rows = _per_block(np.nonzero(sends), depth, 2)
    send_splits = sends.sum(axis=2)
    receive_splits = receives.reshape(depth, placement.ranks, per_rank).sum(axis=2)
    travels = [bool(block.any()) for block in needed]
    return tuple(
        BlockPlan(send_rows[i], send_splits[i], receive_splits[i], local_work[i], remote_work[i], travels[i])
        for i in range(depth)
    )


def _work(experts: np.ndarray, wanted: np.ndarray) -> list[ExpertWork]:
    """Return, per block, the rows with a wanted (sample, choice) and their pairs. `experts`, `wanted` are (depth, n, k)."""
    depth = len(experts)
    rows = wanted.any(axis=2)
    row_of_sample = np.cumsum(rows, axis=1) - 1
    block, sample, choice = np.nonzero(wanted)
    expert = experts[block, sample, choice]
    order = np.lexsort((sample, expert, block))
    pairs = (block[order], row_of_sample[block, sample][order], expert[order])
    columns = (_per_block(np.nonzero(rows), depth, 1), _per_block(pairs, depth, 1), _per_block(pairs, depth, 2))
    return [ExpertWork(*arrays) for arrays in zip(*columns, strict=True)]


def _per_block(columns: tuple[np.ndarray, ...], depth: int, column: int) -> list[np.ndarray]:
    """Return one column split by block. The first column holds the ascending block of each entry."""
    return np.split(columns[column], np.searchsorted(columns[0], np.arange(1, depth)))
