"""Move named ranges of float32 state between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.distributed.comm import Comm


@dataclass(frozen=True)
class Range:
    """`values` (n,) fp32 are elements [start, start + n) of the logical tensor `name`; a view that may be written."""

    name: str
    start: int
    values: Tensor

    @property
    def end(self) -> int:
        return self.start + self.values.numel()


def reshard(comm: Comm, have: Sequence[Range], want: Sequence[Range]) -> int:
    """Fill every rank's `want` from all ranks' `have`, where each element is held once; return bytes this rank sent.

    `have` and `want` may share memory. Only element ranges that overlap travel.
    """
    wanted = comm.gather([[part.name, part.start, part.end] for part in want])
    held = comm.gather([[part.name, part.start, part.end] for part in have])
    mine = {(part.name, part.start): part for part in have}
    outgoing = [_overlaps(held[comm.rank], wanted[rank]) for rank in range(comm.world)]
    incoming = [_overlaps(held[rank], wanted[comm.rank]) for rank in range(comm.world)]
    pieces = [
        mine[name, start].values[low - start : high - start] for rank in outgoing for name, start, low, high in rank
    ]
    sent = torch.cat(pieces) if pieces else torch.empty(0, device=comm.device)
    send_splits = [sum(high - low for *_, low, high in rank) for rank in outgoing]
    receive_splits = [sum(high - low for *_, low, high in rank) for rank in incoming]
    received = sent.new_empty(sum(receive_splits))
    dist.all_to_all_single(received, sent, receive_splits, send_splits)
    _place(received, [item for rank in incoming for item in rank], want)
    return 4 * (sum(send_splits) - send_splits[comm.rank])


def _overlaps(held: list[list], wanted: list[list]) -> list[tuple[str, int, int, int]]:
    """(name, start of the held part, low, high) of every range in both, in an order both sides derive alike."""
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, start, end in held:
        by_name.setdefault(name, []).append((start, end))
    found = set()
    for name, start, end in wanted:
        for low, high in by_name.get(name, ()):
            if max(start, low) < min(end, high):
                found.add((name, low, max(start, low), min(end, high)))
    return sorted(found)


def _place(received: Tensor, ranges: list[tuple[str, int, int, int]], want: Sequence[Range]) -> None:
    at = 0
    for name, _, low, high in ranges:
        values = received[at : at + high - low]
        at += high - low
        for part in want:
            if part.name == name and part.start < high and low < part.end:
                first, last = max(part.start, low), min(part.end, high)
                part.values[first - part.start : last - part.start].copy_(values[first - low : last - low])
