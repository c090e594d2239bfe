"""The plan of a step: what a rank loads, seats, sends, receives and computes, before block 0 runs.

N samples of the global batch, n = P * B of one group and micro-step, P ranks with B samples each, k experts used.
Every array follows from integers that all ranks know, so that the plans of a group fit together without a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.model.moe.placement import Layout, path_need, ranks_needed
from sdit.model.moe.routes import Routes
from sdit.model.moe.seating import Swap, plan_swap, seat
from sdit.model.moe.traffic import Costs, SeatingKind
from sdit.topology import BatchPlan, ExpertGroups


@dataclass(frozen=True)
class Work:
    """Rows of a buffer and the (row, expert) pairs to compute on them, by rising expert, then row.

    `samples` (R,) seated index in the group of every row; `pair_rows`, `pair_experts` (E,).
    """

    samples: np.ndarray
    pair_rows: np.ndarray
    pair_experts: np.ndarray


@dataclass(frozen=True)
class BlockPlan:
    """One rank's exchange in one block, of the rows that are computed together.

    `send_rows` (S,) own rows by destination, then row; a row goes once per destination, whatever it needs there.
    `send_splits`, `receive_splits` (P,) rows to and from each rank. `local`: what own rows need of experts owned or at
    hand; `remote`: what the arrived rows, by source, then row, need here. Results return in the order of arrival, so
    `send_rows` also says where they are added. `travels`: some row of the group does, in either direction of any rank.
    """

    send_rows: np.ndarray
    send_splits: np.ndarray
    receive_splits: np.ndarray
    local: Work
    remote: Work
    travels: bool

    def sent_bytes(self, costs: Costs, at_hand: np.ndarray, owned: np.ndarray) -> int:
        """Exact bytes this rank sends in this block; `at_hand`, `owned` (M,) bool say which experts are so."""
        hand_owned, hand_foreign = int((at_hand & owned).sum()), int((at_hand & ~owned).sum())
        return costs.sent_bytes(len(self.send_rows), len(self.remote.samples), hand_owned, hand_foreign)


@dataclass(frozen=True)
class PartPlan:
    """`rows` of the rank's B that are computed together, and their exchange in every block."""

    rows: slice
    blocks: tuple[BlockPlan, ...]


@dataclass(frozen=True)
class MicroPlan:
    """One rank's plan of one micro-step.

    `positions` (n,) of the group's samples in the global batch, in seated order; `tasks` (n,); `own` are this rank's;
    `experts` (depth, n, k), and `kept` of the same shape (None: dropless). `swap` is None where nobody changes seats.
    `parts` take turns in computing while what the others sent is on its way.
    """

    positions: np.ndarray
    tasks: np.ndarray
    own: slice
    experts: np.ndarray
    kept: np.ndarray | None
    swap: Swap | None
    parts: tuple[PartPlan, ...]


def group_positions(batch: BatchPlan, groups: ExpertGroups, rank: int, micro_step: int, first_index: int) -> np.ndarray:
    """(n,) rising positions in the global batch that the rank's group loads in one micro-step.

    A micro-step is a contiguous chunk of the batch; run index `first_index` + position is loaded by that rank modulo W.
    """
    chunk = np.arange(micro_step * batch.chunk, (micro_step + 1) * batch.chunk)
    return chunk[(first_index + chunk) % groups.world // groups.size == groups.group_of(rank)]


def plan_micro_step(
    routes: Routes,
    tasks: np.ndarray,
    kept: np.ndarray | None,
    layout: Layout,
    batch: BatchPlan,
    groups: ExpertGroups,
    rank: int,
    micro_step: int,
    first_index: int,
    seating: SeatingKind = "path",
    halves: bool = False,
) -> MicroPlan:
    """The plan of `rank` for one micro-step of the global batch with `tasks` (N,) and `kept` (depth, N, k)."""
    positions = group_positions(batch, groups, rank, micro_step, first_index)
    home = (first_index + positions) % groups.size
    place, ranks = groups.place_of(rank), groups.size
    seats = home
    if seating == "path" and ranks > 1 and not layout.at_hand.all():
        seats = seat(tasks[positions], path_need(routes.experts, layout), batch.micro_batch, home)
    seated = positions[np.argsort(seats, kind="stable")]
    experts = routes.experts[:, tasks[seated]]
    group_kept = None if kept is None else kept[:, seated]
    return MicroPlan(
        positions=seated,
        tasks=tasks[seated],
        own=slice(place * batch.micro_batch, (place + 1) * batch.micro_batch),
        experts=experts,
        kept=group_kept,
        swap=None if (seats == home).all() else plan_swap(home, seats, ranks, place),
        parts=tuple(
            PartPlan(rows, plan_blocks(experts, group_kept, layout, place, rows))
            for rows in part_rows(batch.micro_batch, halves and ranks > 1)
        ),
    )


def part_rows(micro_batch: int, halves: bool) -> tuple[slice, ...]:
    """The parts of a rank's rows: all of them, or two halves, the first not the smaller one."""
    middle = -(-micro_batch // 2)
    return (slice(0, middle), slice(middle, micro_batch)) if halves and micro_batch > 1 else (slice(0, micro_batch),)


def plan_blocks(
    experts: np.ndarray, kept: np.ndarray | None, layout: Layout, place: int, rows: slice = slice(None)
) -> tuple[BlockPlan, ...]:
    """The exchange of the rank at `place` in every block, for the group's `experts` (depth, n, k) in seated order.

    `rows` of every rank take part; `send_rows` counts from the first of them.
    """
    seats = np.arange(experts.shape[1]).reshape(layout.ranks, -1)[:, rows].ravel()
    experts, kept = experts[:, seats], None if kept is None else kept[:, seats]
    depth, samples, _ = experts.shape
    per_rank = samples // layout.ranks
    own = slice(place * per_rank, (place + 1) * per_rank)
    needed = ranks_needed(experts, layout, kept)
    needed[:, np.arange(samples), np.arange(samples) // per_rank] = False
    sends = needed[:, own].transpose(0, 2, 1)
    receives = needed[:, :, place]
    block = np.arange(depth)[:, None, None]
    mine, at_hand = layout.place[block, experts] == place, layout.at_hand[block, experts]
    if kept is not None:
        mine, at_hand = mine & kept, at_hand & kept
    local = np.zeros(experts.shape, dtype=bool)
    local[:, own] = (mine | at_hand)[:, own]
    local_work = _work(experts, local, seats)
    remote_work = _work(experts, mine & ~at_hand & receives[:, :, None], seats)
    send_rows = _per_block(np.nonzero(sends), depth, 2)
    send_splits = sends.sum(axis=2)
    receive_splits = receives.reshape(depth, layout.ranks, per_rank).sum(axis=2)
    travels = [bool(block.any()) for block in needed]
    return tuple(
        BlockPlan(send_rows[i], send_splits[i], receive_splits[i], local_work[i], remote_work[i], travels[i])
        for i in range(depth)
    )


def _work(experts: np.ndarray, wanted: np.ndarray, seats: np.ndarray) -> list[Work]:
    """Per block, the rows with a wanted (sample, choice) and the pairs on them; `experts`, `wanted` (depth, n, k).

    `seats` (n,) of the samples in the group.
    """
    depth = len(experts)
    rows = wanted.any(axis=2)
    row_of_sample = np.cumsum(rows, axis=1) - 1
    block, sample, choice = np.nonzero(wanted)
    expert = experts[block, sample, choice]
    order = np.lexsort((sample, expert, block))
    pairs = (block[order], row_of_sample[block, sample][order], expert[order])
    served, sample = np.nonzero(rows)
    parts = (_per_block((served, seats[sample]), depth, 1), _per_block(pairs, depth, 1), _per_block(pairs, depth, 2))
    return [Work(*arrays) for arrays in zip(*parts, strict=True)]


def _per_block(columns: tuple[np.ndarray, ...], depth: int, column: int) -> list[np.ndarray]:
    """One column cut at the blocks; the first column holds the rising block of every entry."""
    return np.split(columns[column], np.searchsorted(columns[0], np.arange(1, depth)))
