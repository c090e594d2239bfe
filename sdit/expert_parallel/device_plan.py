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
    """Collects index arrays on the host. `views` returns them as slices of one device tensor."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def keep(self, values: np.ndarray) -> int:
        self._arrays.append(np.asarray(values, dtype=np.int64))
        return len(self._arrays) - 1

    def views(self, device: torch.device) -> tuple[Tensor, ...]:
        packed = torch.from_numpy(np.concatenate(self._arrays)).to(device, non_blocking=True)
        return packed.split([len(array) for array in self._arrays])


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


def to_device(plan: MicroStepPlan, placement: ExpertPlacement, ep_rank: int, device: torch.device) -> DevicePlan:
    """Return the plan on the device. The index arrays of all blocks are copied in one packed tensor."""
    packer, drafts = _Packer(), []
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
        drafts.append((block, send, local, remote, counts, replica_rows))
    views = packer.views(device)
    blocks = [
        BlockDevicePlan(
            send_rows=views[send],
            send_splits=block.send_splits.tolist(),
            receive_splits=block.receive_splits.tolist(),
            local=local.work(views),
            remote=remote.work(views),
            travels=block.travels,
            replica_counts=counts,
            replica_rows=views[replica_rows],
        )
        for block, send, local, remote, counts, replica_rows in drafts
    ]
    return DevicePlan(_view(plan, device), blocks)


def _view(plan: MicroStepPlan, device: torch.device) -> TaskView:
    kept = None if plan.kept is None else torch.from_numpy(plan.kept).to(device, non_blocking=True)
    tasks = torch.from_numpy(plan.tasks).to(device, non_blocking=True)
    experts = torch.from_numpy(plan.experts).to(device, non_blocking=True)
    return TaskView(tasks, plan.own, experts, kept)


def _draft(
    packer: _Packer, work: ExpertWork, columns: np.ndarray, samples: np.ndarray, counted: np.ndarray | None
) -> _WorkDraft:
    """Return the work on all rows `samples` (ascending).

    It consists of gate rows, gate columns, and the (row, column) pairs sorted by column.
    """
    rows = np.searchsorted(samples, work.samples[work.pair_rows])
    column_of_expert = np.argsort(columns)
    pair_columns = column_of_expert[np.searchsorted(columns, work.pair_experts, sorter=column_of_expert)]
    order = np.argsort(pair_columns, kind="stable")
    counts = np.bincount(pair_columns, minlength=len(columns))
    return _WorkDraft(
        samples=packer.keep(samples),
        columns=packer.keep(columns),
        counted=None if counted is None else packer.keep(counted),
        used=None if len(work.samples) == len(samples) else packer.keep(np.searchsorted(samples, work.samples)),
        pairs=(packer.keep(rows[order]), packer.keep(pair_columns[order]), packer.keep(counts.cumsum())),
        counts=counts.tolist(),
    )
