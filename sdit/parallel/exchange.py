"""Uneven all-to-all inside an expert-parallel group, asynchronous forward and backward. S rows sent, R rows received.

A transfer is two autograd nodes: `begin` starts it and `finish` waits. In backward the roles swap: `finish` starts the
way back and `begin` waits, so that whatever ran between the two in forward hides the transfer in both directions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What was really sent and waited for since the last `take`."""

    bytes: dict[str, int] = field(default_factory=dict)  # by mode: tokens, weights, seats
    wait_seconds: float = 0.0

    def add(self, mode: str, size_bytes: int) -> None:
        self.bytes[mode] = self.bytes.get(mode, 0) + size_bytes

    def take(self) -> tuple[dict[str, int], float]:
        """Return bytes by mode and seconds of waiting, and start again from zero."""
        taken = (self.bytes, self.wait_seconds)
        self.bytes, self.wait_seconds = {}, 0.0
        return taken


@dataclass(frozen=True)
class Wire:
    """One group's transport: `place` is this rank's place among `ranks`."""

    group: Any
    place: int
    ranks: int
    overlap: bool
    traffic: Traffic

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        """Start moving rows (S, ...) to their ranks; returns the buffer (R, ...) and what to wait for (None: it is there)."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        row_bytes = rows[0].numel() * rows.element_size() if len(rows) else 0
        self.traffic.add(mode, (sum(send_splits) - send_splits[self.place]) * row_bytes)
        work = dist.all_to_all_single(
            _as_bytes(received),
            _as_bytes(rows),
            list(receive_splits),
            list(send_splits),
            group=self.group,
            async_op=True,
        )
        if self.overlap:
            return received, work
        self.wait(work)
        return received, None

    def wait(self, work: Any) -> None:
        """Wait for a transfer; the time spent here is what nothing could hide."""
        if work is not None:
            started = time.perf_counter()
            work.wait()
            self.traffic.wait_seconds += time.perf_counter() - started


class _Transfer:
    """The state that the two nodes of one transfer share."""

    def __init__(self, wire: Wire, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str) -> None:
        self.wire, self.mode = wire, mode
        self.send_splits, self.receive_splits = send_splits, receive_splits
        self.work: Any = None
        self.received: Tensor | None = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.received, transfer.work = transfer.wire.send(
            rows, transfer.send_splits, transfer.receive_splits, transfer.mode
        )
        # A token without memory, shaped like the rows: it carries the gradient from `finish` back to here.
        return rows.new_empty((1,) * rows.dim()).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.wire.wait(transfer.work)
        transfer.work = None
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wire.wait(transfer.work)
        received, transfer.work, transfer.received = transfer.received, None, None
        assert received is not None
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        back, transfer.work = transfer.wire.send(grad, transfer.receive_splits, transfer.send_splits, transfer.mode)
        return back, None


@dataclass(frozen=True)
class Pending:
    """Rows on their way; `wait()` gives them."""

    token: Tensor
    transfer: _Transfer

    def wait(self) -> Tensor:
        arrived: Tensor = _Finish.apply(self.token, self.transfer)
        return arrived


def begin_rows(
    wire: Wire, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str = "tokens"
) -> Pending:
    """Start sending rows (S, ...), ordered by destination; what arrives is ordered by source. Differentiable."""
    transfer = _Transfer(wire, send_splits, receive_splits, mode)
    return Pending(_Begin.apply(rows, transfer), transfer)


def begin_share(wire: Wire, rows: Tensor, counts: Sequence[int]) -> Pending:
    """Start sending own rows (counts[place], F) to all other ranks; theirs arrive by rank. Gradients are summed at home."""
    others = [rank != wire.place for rank in range(wire.ranks)]
    send = [len(rows) * other for other in others]
    receive = [count * other for count, other in zip(counts, others, strict=True)]
    copies = rows.expand(wire.ranks - 1, *rows.shape).flatten(0, 1)
    return begin_rows(wire, copies, send, receive, "weights")


def _as_bytes(rows: Tensor) -> Tensor:
    """(rows, bytes of a row) uint8 view: gloo has no bfloat16."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
