"""Moves named ranges of float32 state between ranks. Each rank knows from the layout which rank has what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.distributed.comm import Comm

# Given the name of a logical tensor and a range [start, end) of it: the ranks with a part of it, as (rank, start, end).
Holders = Callable[[str, int, int], Iterable[tuple[int, int, int]]]


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


def reshard(comm: Comm, have: Sequence[Range], want: Sequence[Range], sources: Holders, targets: Holders) -> int:
    """Fill `want` of each rank from `have` of all ranks. Return the bytes that this rank sent.

    Each element is in the `have` of exactly one rank, which `sources` names. `targets` names the ranks that want it. `have`
    and `want` may share memory. Only overlapping ranges are sent, and no rank asks another one.
    """
    outgoing, incoming = _parts(have, targets), _parts(want, sources)
    # Offloaded state is in host memory, which NCCL cannot send.
    slices = [values for *_, values in outgoing]
    sent = torch.cat(slices).to(comm.device) if slices else torch.empty(0, device=comm.device)
    send_splits, receive_splits = (_sizes(parts, comm.world) for parts in (outgoing, incoming))
    received = sent.new_empty(sum(receive_splits))
    dist.all_to_all_single(received, sent, receive_splits, send_splits)
    _copy_out(received, [values for *_, values in incoming])
    return 4 * (sum(send_splits) - send_splits[comm.rank])


def _parts(ranges: Sequence[Range], holders: Holders) -> list[tuple[int, str, int, Tensor]]:
    """Return (rank, name, start, values) of each part of this rank's ranges that another rank wants or has.

    Sender and receiver compute the same order.
    """
    parts = [
        (rank, each.name, start, each.values[start - each.start : end - each.start])
        for each in ranges
        for rank, start, end in holders(each.name, each.start, each.end)
    ]
    return sorted(parts, key=lambda part: part[:3])


def _sizes(parts: Sequence[tuple[int, str, int, Tensor]], world: int) -> list[int]:
    """Return the elements that are exchanged with each rank."""
    sizes = [0] * world
    for rank, *_, values in parts:
        sizes[rank] += values.numel()
    return sizes


def _copy_out(received: Tensor, targets: Sequence[Tensor]) -> None:
    for target, values in zip(targets, received.split([target.numel() for target in targets]), strict=True):
        target.copy_(values)
