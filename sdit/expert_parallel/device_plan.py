"""The plan of a micro-step as index tensors on the device: the rows and the experts of each block.

B local samples of n in the group, M experts of a block, S rows sent, R rows received, K columns of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdit.contracts import TaskView
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.step_plan import ExpertWork, MicroStepPlan
from sdit.model.moe.base import ExpertRows
from sdit.model.moe.grouped import SortedPairs
from sdit.transfers import upload


@dataclass(frozen=True)
class DeviceWork:
    """The expert work on a buffer of R rows.

    `samples` (R,) and `columns` (K,) select the gates of the rows from those of the group (n, M). `counted` (K,) is 0 for
    columns that another rank computes (None: all are computed here). `rows` are the rows that use each column.
    """

    samples: Tensor
    columns: Tensor
    counted: Tensor | None
    rows: ExpertRows

    def weights(self, gates: Tensor) -> Tensor:
        """Return the gates (R, K) of the rows, given the gates (n, M) of the group."""
        selected = gates.index_select(0, self.samples).index_select(1, self.columns)
        return selected if self.counted is None else selected * self.counted


@dataclass(frozen=True)
class BlockDevicePlan:
    """The exchange of one block, see `step_plan.BlockPlan`.

    `replica_counts` (P,) is the number of replicated experts that each rank owns. `replica_rows` are the rows of this
    rank's replicated experts in the local stack of experts.
    """

    send_rows: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    local: DeviceWork
    remote: DeviceWork
    travels: bool
    replica_counts: list[int]
    replica_rows: Tensor


@dataclass(frozen=True)
class DevicePlan:
    """The input of one forward pass: the samples whose gates are computed, and the exchange of each block."""

    view: TaskView
    blocks: list[BlockDevicePlan]


class _Packer:
    """Collects index arrays on the host. Each has a number."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def keep(self, values: np.ndarray) -> int:
        self.arrays.append(np.asarray(values, dtype=np.int64))
        return len(self.arrays) - 1


@dataclass(frozen=True)
class _WorkDraft:
    """A `DeviceWork` that refers to its arrays by their number in the packer."""

    samples: int
    columns: int
    counted: int | None
    used: int | None
    pairs: tuple[int, int, int]
    counts: list[int]

    def work(self, views: Sequence[Tensor]) -> DeviceWork:
        counted = None if self.counted is None else views[self.counted]
        used = None if self.used is None else views[self.used]
        pairs = SortedPairs(*(views[number] for number in self.pairs))
        return DeviceWork(views[self.samples], views[self.columns], counted, ExpertRows(used, pairs, self.counts))


@dataclass(frozen=True)
class _BlockDraft:
    """A `BlockDevicePlan` that refers to its arrays by their number in the packer."""

    send: int
    send_splits: list[int]
    receive_splits: list[int]
    travels: bool
    local: _WorkDraft
    remote: _WorkDraft
    replica_counts: list[int]
    replica_rows: int

    def plan(self, views: Sequence[Tensor]) -> BlockDevicePlan:
        return BlockDevicePlan(
            send_rows=views[self.send],
            send_splits=self.send_splits,
            receive_splits=self.receive_splits,
            local=self.local.work(views),
            remote=self.remote.work(views),
            travels=self.travels,
            replica_counts=self.replica_counts,
            replica_rows=views[self.replica_rows],
        )


@dataclass(frozen=True)
class PackedPlan:
    """The index arrays of all blocks in one array of host memory. The first are tasks, experts, and kept if any."""

    own: slice
    experts_shape: tuple[int, ...]
    has_kept: bool
    packed: np.ndarray
    sizes: list[int]
    blocks: list[_BlockDraft]

    def to_device(self, device: torch.device) -> DevicePlan:
        """Return the plan on the device, after one copy."""
        views = upload(torch.from_numpy(self.packed), device).split(self.sizes)
        view = TaskView(
            task=views[0],
            own=self.own,
            experts=views[1].view(self.experts_shape),
            kept=views[2].view(self.experts_shape).bool() if self.has_kept else None,
        )
        return DevicePlan(view, [block.plan(views) for block in self.blocks])


def pack_plan(plan: MicroStepPlan, placement: ExpertPlacement, ep_rank: int) -> PackedPlan:
    """Return the plan with the index arrays of all blocks in one array."""
    packer, drafts = _Packer(), []
    packer.keep(plan.tasks)
    packer.keep(plan.experts.ravel())
    if plan.kept is not None:
        packer.keep(plan.kept.ravel())
    own_samples = np.arange(plan.own.start, plan.own.stop)
    for block, ids_of_rank, replicated in zip(
        plan.blocks, placement.experts_of_rank, placement.replicated, strict=True
    ):
        own = ids_of_rank[ep_rank]
        foreign = [ids[replicated[ids]] for rank, ids in enumerate(ids_of_rank) if rank != ep_rank]
        local = _draft(packer, block.local, np.concatenate([own, *foreign]), own_samples, None)
        # The source rank of a received row computes the row's replicated experts, so their columns are not counted here.
        counted = None if not replicated[own].any() else ~replicated[own]
        remote = _draft(packer, block.remote, own, block.remote.samples, counted)
        counts = [int(replicated[ids].sum()) for ids in ids_of_rank]
        send, replica_rows = packer.keep(block.send_rows), packer.keep(np.flatnonzero(replicated[own]))
        splits = block.send_splits.tolist(), block.receive_splits.tolist()
        drafts.append(_BlockDraft(send, *splits, block.travels, local, remote, counts, replica_rows))
    packed, sizes = np.concatenate(packer.arrays), [len(array) for array in packer.arrays]
    return PackedPlan(plan.own, plan.experts.shape, plan.kept is not None, packed, sizes, drafts)


def _draft(
    packer: _Packer, work: ExpertWork, columns: np.ndarray, samples: np.ndarray, counted: np.ndarray | None
) -> _WorkDraft:
    """Return the work on all rows `samples` (ascending).

    It consists of gate rows, gate columns, and the (row, column) pairs sorted by column.
    """
    rows = np.searchsorted(samples, work.samples[work.pair_rows])
    first, stop = (np.searchsorted(work.pair_experts, columns, side) for side in ("left", "right"))  # they are sorted
    counts = stop - first
    ends = counts.cumsum()
    order = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
    pair_columns = np.repeat(np.arange(len(columns)), counts)
    return _WorkDraft(
        samples=packer.keep(samples),
        columns=packer.keep(columns),
        counted=None if counted is None else packer.keep(counted),
        used=None if len(work.samples) == len(samples) else packer.keep(np.searchsorted(samples, work.samples)),
        pairs=(packer.keep(rows[order]), packer.keep(pair_columns), packer.keep(ends)),
        counts=counts.tolist(),
    )
