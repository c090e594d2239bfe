"""The plan of a micro-step as index tensors on the device: the rows and the experts of each block.

B local samples of n in the group, M experts of a block, S rows sent, R rows received, K columns of gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdit.contracts import TaskView
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.step_plan import BlockPlan, ExpertWork, MicroStepPlan
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


@dataclass(frozen=True)
class PackedPlan:
    """The index arrays of all blocks in one array of host memory, and the plan as a function of their views on the device."""

    packed: np.ndarray
    sizes: list[int]
    plan: Callable[[Sequence[Tensor]], DevicePlan]

    def to_device(self, device: torch.device) -> DevicePlan:
        """Return the plan on the device, after one copy."""
        return self.plan(upload(torch.from_numpy(self.packed), device).split(self.sizes))


class _Packer:
    """Collects index arrays on the host, flattened. `keep` returns the number of an array."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def keep(self, values: np.ndarray) -> int:
        self.arrays.append(np.asarray(values, dtype=np.int64).ravel())
        return len(self.arrays) - 1


def pack_plan(plan: MicroStepPlan, placement: ExpertPlacement, ep_rank: int) -> PackedPlan:
    """Return the plan with the index arrays of all blocks in one array."""
    packer, shape, own = _Packer(), plan.experts.shape, plan.own
    tasks, experts = packer.keep(plan.tasks), packer.keep(plan.experts)
    kept = None if plan.kept is None else packer.keep(plan.kept)
    columns = zip(plan.blocks, placement.experts_of_rank, placement.replicated, strict=True)
    blocks = [_pack_block(packer, *column, ep_rank, np.arange(own.start, own.stop)) for column in columns]

    def plan_of(views: Sequence[Tensor]) -> DevicePlan:
        kept_view = None if kept is None else views[kept].view(shape).bool()
        view = TaskView(task=views[tasks], own=own, experts=views[experts].view(shape), kept=kept_view)
        return DevicePlan(view, [block(views) for block in blocks])

    return PackedPlan(np.concatenate(packer.arrays), [len(array) for array in packer.arrays], plan_of)


def _pack_block(
    packer: _Packer, block: BlockPlan, ids_of_rank: np.ndarray, replicated: np.ndarray, ep_rank: int,
    own_samples: np.ndarray,
) -> Callable[[Sequence[Tensor]], BlockDevicePlan]:  # fmt: skip
    """Return the plan of a block as a function of the views. `ids_of_rank` are (P, M_local), `replicated` is (M,)."""
    own = ids_of_rank[ep_rank]
    foreign = [ids[replicated[ids]] for rank, ids in enumerate(ids_of_rank) if rank != ep_rank]
    local = _pack_work(packer, block.local, np.concatenate([own, *foreign]), own_samples, None)
    # The source rank of a received row computes the row's replicated experts, so their columns are not counted here.
    counted = None if not replicated[own].any() else ~replicated[own]
    remote = _pack_work(packer, block.remote, own, block.remote.samples, counted)
    send, replica_rows = packer.keep(block.send_rows), packer.keep(np.flatnonzero(replicated[own]))
    send_splits, receive_splits, travels = block.send_splits.tolist(), block.receive_splits.tolist(), block.travels
    counts = [int(replicated[ids].sum()) for ids in ids_of_rank]
    return lambda views: BlockDevicePlan(
        send_rows=views[send], send_splits=send_splits, receive_splits=receive_splits, local=local(views),
        remote=remote(views), travels=travels, replica_counts=counts, replica_rows=views[replica_rows],
    )  # fmt: skip


def _pack_work(
    packer: _Packer, work: ExpertWork, columns: np.ndarray, samples: np.ndarray, counted: np.ndarray | None
) -> Callable[[Sequence[Tensor]], DeviceWork]:
    """Return the work on all rows `samples` (ascending) as a function of the views.

    It consists of gate rows, gate columns, and the (row, column) pairs sorted by column.
    """
    rows = np.searchsorted(samples, work.samples[work.pair_rows])
    first, stop = (np.searchsorted(work.pair_experts, columns, side) for side in ("left", "right"))  # they are sorted
    counts = stop - first
    ends = counts.cumsum()
    order = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
    pair_columns = np.repeat(np.arange(len(columns)), counts)
    always = [packer.keep(each) for each in (samples, columns, rows[order], pair_columns, ends)]
    used = None if len(work.samples) == len(samples) else packer.keep(np.searchsorted(samples, work.samples))
    factors, numbers = None if counted is None else packer.keep(counted), counts.tolist()

    def work_of(views: Sequence[Tensor]) -> DeviceWork:
        of_samples, of_columns, *pairs = (views[number] for number in always)
        expert_rows = ExpertRows(None if used is None else views[used], SortedPairs(*pairs), numbers)
        return DeviceWork(of_samples, of_columns, None if factors is None else views[factors], expert_rows)

    return work_of
