"""Moves named ranges of float32 state between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.distributed.comm import Comm


@dataclass(frozen=True)
class Range:
    """The elements [start, start + n) of the logical tensor `name`.

    `values` (n,) fp32 is a view that may be written.
    """

    name: str
    start: int
    values: Tensor

    @property
    def end(self) -> int:
        return self.start + self.values.numel()


def reshard(comm: Comm, have: Sequence[Range], want: Sequence[Range]) -> int:
    """Fill `want` of each rank from `have` of all ranks. Return the bytes that this rank sent.

    Each element is in the `have` of exactly one rank. `have` and `want` may share memory. Only overlapping ranges are sent.
    """
    wanted = comm.gather([[target.name, target.start, target.end] for target in want])
    available = comm.gather([[source.name, source.start, source.end] for source in have])
    mine = {(source.name, source.start): source for source in have}
    outgoing = [_overlaps(available[comm.rank], wanted[rank]) for rank in range(comm.world)]
    incoming = [_overlaps(available[rank], wanted[comm.rank]) for rank in range(comm.world)]
    slices = [
        mine[name, start].values[low - start : high - start] for rank in outgoing for name, start, low, high in rank
    ]
    # Offloaded state is in host memory, which NCCL cannot send.
    sent = torch.cat(slices).to(comm.device) if slices else torch.empty(0, device=comm.device)
    send_splits = [sum(high - low for *_, low, high in rank) for rank in outgoing]
    receive_splits = [sum(high - low for *_, low, high in rank) for rank in incoming]
    received = sent.new_empty(sum(receive_splits))
    dist.all_to_all_single(received, sent, receive_splits, send_splits)
    _copy_out(received, [item for rank in incoming for item in rank], want)
    return 4 * (sum(send_splits) - send_splits[comm.rank])


def _overlaps(available: list[list], wanted: list[list]) -> list[tuple[str, int, int, int]]:
    """Return (name, start of the available range, low, high) of each overlap.

    Sender and receiver compute the same order.
    """
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in available:
        by_name.setdefault(name, []).append((start, end))
    found = set()
    for name, start, end in wanted:
        for low, high in by_name.get(name, ()):
            if max(start, low) < min(end, high):
                found.add((name, low, max(start, low), min(end, high)))
    return sorted(found)


def _copy_out(received: Tensor, ranges: list[tuple[str, int, int, int]], want: Sequence[Range]) -> None:
    at = 0
    for name, _, low, high in ranges:
        values = received[at : at + high - low]
        at += high - low
        for target in want:
            if target.name == name and target.start < high and low < target.end:
                first, last = max(target.start, low), min(target.end, high)
                target.values[first - target.start : last - target.start].copy_(values[first - low : last - low])
