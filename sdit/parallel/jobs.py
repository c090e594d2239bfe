"""A plan's work as index tensors on the device: which rows meet which experts, in every part and block.

B own samples of n in the group, M experts, S rows sent, R received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan, Work


@dataclass(frozen=True)
class Job:
    """Work on the device: `samples` (R,), `columns` (K,) of the group's gates; `counted` (K,) is 0 for those left out;
    `busy` are the rows that use any column (None: all), and `by_column` lists those that use each."""

    samples: Tensor
    columns: Tensor
    counted: Tensor | None
    busy: Tensor | None
    by_column: list[tuple[int, Tensor]]


@dataclass(frozen=True)
class BlockJobs:
    """One part's work in one block: its exchange (see `plan.BlockPlan`), and of the experts at hand how many every rank owns
    (`hand_counts`) and which rows of the own stack they are (`hand_slots`)."""

    send_rows: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    local: Job
    remote: Job
    travels: bool
    hand_counts: list[int]
    hand_slots: Tensor


class _Packer:
    """Collects index arrays on the host; `views` are their slices of one device tensor."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def keep(self, values: np.ndarray) -> int:
        self._arrays.append(np.asarray(values, dtype=np.int64))
        return len(self._arrays) - 1

    def views(self, device: torch.device) -> tuple[Tensor, ...]:
        packed = torch.from_numpy(np.concatenate(self._arrays)).to(device, non_blocking=True)
        return packed.split([len(array) for array in self._arrays])


@dataclass(frozen=True)
class _JobDraft:
    samples: int
    columns: int
    counted: int | None
    busy: int | None
    by_column: list[tuple[int, int]]

    def job(self, views: Sequence[Tensor]) -> Job:
        counted = None if self.counted is None else views[self.counted]
        busy = None if self.busy is None else views[self.busy]
        by_column = [(column, views[rows]) for column, rows in self.by_column]
        return Job(views[self.samples], views[self.columns], counted, busy, by_column)


def upload(plan: MicroPlan, layout: Layout, place: int, device: torch.device) -> list[list[BlockJobs]]:
    """The index arrays of all parts and blocks on the device: one packed copy, then views."""
    packer, drafts = _Packer(), []
    for part in plan.parts:
        own_samples = np.arange(plan.own.start, plan.own.stop)[part.rows]
        for block, slots, hand in zip(part.blocks, layout.slots, layout.at_hand, strict=True):
            foreign = [ids[hand[ids]] for rank, ids in enumerate(slots) if rank != place]
            local = _draft(packer, block.local, np.concatenate([slots[place], *foreign]), own_samples, None)
            counted = None if not hand[slots[place]].any() else ~hand[slots[place]]
            remote = _draft(packer, block.remote, slots[place], block.remote.samples, counted)
            counts = [int(hand[ids].sum()) for ids in slots]
            send, hand_slots = packer.keep(block.send_rows), packer.keep(np.flatnonzero(hand[slots[place]]))
            drafts.append((block, send, local, remote, counts, hand_slots))
    views = packer.views(device)
    blocks = [
        BlockJobs(
            send_rows=views[send],
            send_splits=block.send_splits.tolist(),
            receive_splits=block.receive_splits.tolist(),
            local=local.job(views),
            remote=remote.job(views),
            travels=block.travels,
            hand_counts=counts,
            hand_slots=views[hand_slots],
        )
        for block, send, local, remote, counts, hand_slots in drafts
    ]
    depth = len(layout.slots)
    return [blocks[first : first + depth] for first in range(0, len(blocks), depth)]


def _draft(
    packer: _Packer, work: Work, columns: np.ndarray, samples: np.ndarray, counted: np.ndarray | None
) -> _JobDraft:
    """A job on all rows `samples` (rising): gate rows, gate columns, and per column the rows that use its expert."""
    rows = np.searchsorted(samples, work.samples[work.pair_rows])
    users = [(column, rows[work.pair_experts == expert]) for column, expert in enumerate(columns)]
    return _JobDraft(
        samples=packer.keep(samples),
        columns=packer.keep(columns),
        counted=None if counted is None else packer.keep(counted),
        busy=None if len(work.samples) == len(samples) else packer.keep(np.searchsorted(samples, work.samples)),
        by_column=[(column, packer.keep(used)) for column, used in users if len(used)],
    )
