"""Uneven all-to-all inside an expert-parallel group, asynchronous forward and backward. S rows sent, R rows received.

A transfer consists of two autograd nodes: `begin` starts it and `finish` waits. In backward, `finish` starts the
reverse transfer and `begin` waits. The computation between the two nodes overlaps with the transfer in both passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdit.contracts import Batch
from sdit.distributed.comm import Comm
from sdit.distributed.deepspeed_internals import make_expert_groups
from sdit.expert_parallel.assignment import SampleExchange
from sdit.topology import ExpertGroups
from sdit.transfers import upload

MODES = ("tokens", "weights", "samples")
MEASURED_STEPS = 10  # on a GPU, the waits of one of this many steps are measured
# For methods that transfer. The token of a transfer has a shape but no memory, which torch.compile cannot trace. The graph breaks
# at these methods, and the code between them is compiled.
eagerly = torch.compiler.disable


class TrafficCounter:
    """Counts the bytes sent and the seconds of waiting for transfers since the last `take`, which is called once per step.

    On a GPU the host only queues a wait. The device's clock then measures how long its stream waited. Each wait then needs
    two events of the host. Therefore one of `MEASURED_STEPS` steps is measured, and the others repeat its seconds.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._bytes: dict[str, int] = {}  # by mode, see MODES
        self._wait_seconds = 0.0  # since the last `take`; on a GPU of the newest measured step
        self._steps = 0
        self._stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of a measured step

    def add(self, mode: str, size_bytes: int) -> None:
        """Count bytes that were sent in one of MODES."""
        self._bytes[mode] = self._bytes.get(mode, 0) + size_bytes

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the `with` as waiting for a transfer."""
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._wait_seconds += time.perf_counter() - started
        elif self._steps % MEASURED_STEPS == 1:  # not the first step, in which NCCL opens connections
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._stalls.append((begin, end))
        else:
            yield

    def take(self) -> tuple[dict[str, int], float]:
        """Return bytes by mode and seconds of waiting, and begin the next step."""
        self._steps += 1
        if self._stalls and all(end.query() for _, end in self._stalls):
            self._wait_seconds = sum(begin.elapsed_time(end) for begin, end in self._stalls) / 1000
            self._stalls = []
        taken = (self._bytes, self._wait_seconds)
        self._bytes = {}
        if not self._on_gpu:
            self._wait_seconds = 0.0
        return taken

    def forget(self) -> None:
        """Discard the bytes and the waits since the last `take`."""
        self._bytes, self._stalls = {}, []
        if not self._on_gpu:
            self._wait_seconds = 0.0


@dataclass(frozen=True)
class ExpertGroup:
    """The communicator of one expert-parallel group: `ep_rank` is this process's rank among `ranks`."""

    process_group: Any
    ep_rank: int
    ranks: int
    overlap: bool
    traffic: TrafficCounter

    @classmethod
    def create(cls, comm: Comm, ranks: int, overlap: bool) -> ExpertGroup:
        """Make DeepSpeed's expert groups of `ranks` ranks, on all ranks of the run, and return this rank's."""
        process_group = make_expert_groups(ranks) if ranks > 1 else None
        ep_rank = ExpertGroups(comm.world, ranks).ep_rank_of(comm.rank)
        return cls(process_group, ep_rank, ranks, overlap, TrafficCounter(comm.device))

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        """Start to send rows (S, ...) to their ranks.

        Return the receive buffer (R, ...) and the pending operation, or None if the transfer has ended.
        """
        rows = rows.contiguous()
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        row_bytes = rows[0].numel() * rows.element_size() if len(rows) else 0
        self.traffic.add(mode, (sum(send_splits) - send_splits[self.ep_rank]) * row_bytes)
        work = dist.all_to_all_single(
            _as_bytes(received),
            _as_bytes(rows),
            list(receive_splits),
            list(send_splits),
            group=self.process_group,
            async_op=True,
        )
        if self.overlap:
            return received, work
        self.wait(work)
        return received, None

    def wait(self, work: Any) -> None:
        """Wait for a transfer. The time spent here did not overlap with computation."""
        if work is not None:
            with self.traffic.waiting():
                work.wait()


def exchange_samples(group: ExpertGroup, exchange: SampleExchange, batch: Batch, index: np.ndarray) -> Batch:
    """Send samples with all that belongs to them to the ranks of the group that compute them.

    Return the batch with the run indices `index` (B,). Times and labels are sent as float32, exact for integers below 2^24.
    """
    device, shape = batch.x0.device, batch.x0.shape
    images = [image for image in (batch.x0, batch.noise, batch.other_target) if image is not None]
    columns = (batch.t[:, None].float(), batch.y[:, None].float(), *(image.flatten(1) for image in images))
    rows = torch.cat(columns, dim=1)[upload(torch.from_numpy(exchange.send_rows), device)]
    received, work = group.send(rows, exchange.send_splits.tolist(), exchange.receive_splits.tolist(), "samples")
    group.wait(work)
    ordered = received[upload(torch.from_numpy(exchange.order), device)]
    t, y, *received_images = ordered.split([column.shape[1] for column in columns], dim=1)
    x0, noise, *other = (image.contiguous().view(shape) for image in received_images)
    return Batch(
        index=torch.from_numpy(index),
        x0=x0,
        noise=noise,
        t=t[:, 0].contiguous().to(batch.t.dtype),
        y=y[:, 0].to(batch.y.dtype),
        other_target=other[0] if other else None,
    )


class _Transfer:
    """The state that the two autograd nodes of one transfer share."""

    def __init__(
        self, group: ExpertGroup, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> None:
        self.group, self.mode = group, mode
        self.send_splits, self.receive_splits = send_splits, receive_splits
        self.work: Any = None
        self.received: Tensor | None = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.received, transfer.work = transfer.group.send(
            rows, transfer.send_splits, transfer.receive_splits, transfer.mode
        )
        # A token with the shape of the rows but without memory. The gradient flows through it from `finish` to here.
        return rows.new_empty((1,) * rows.dim()).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.group.wait(transfer.work)
        transfer.work = None
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.group.wait(transfer.work)
        received, transfer.work, transfer.received = transfer.received, None, None
        assert received is not None
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        back, transfer.work = transfer.group.send(grad, transfer.receive_splits, transfer.send_splits, transfer.mode)
        return back, None


@dataclass(frozen=True)
class Pending:
    """A transfer of rows that has begun. `wait()` returns the received rows."""

    token: Tensor
    transfer: _Transfer

    def wait(self) -> Tensor:
        """Wait for the transfer and return the received rows. Differentiable."""
        return _Finish.apply(self.token, self.transfer)


def begin_rows(
    group: ExpertGroup, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str = "tokens"
) -> Pending:
    """Start to send rows (S, ...), ordered by destination. The received rows are ordered by source. Differentiable."""
    transfer = _Transfer(group, send_splits, receive_splits, mode)
    return Pending(_Begin.apply(rows, transfer), transfer)


def begin_replicate(group: ExpertGroup, rows: Tensor, counts: Sequence[int]) -> Pending:
    """Start to send the local rows (counts[ep_rank], F) to all other ranks.

    The rows of the other ranks are received in rank order. In backward the owner sums the gradients.
    """
    others = [rank != group.ep_rank for rank in range(group.ranks)]
    send = [len(rows) * other for other in others]
    receive = [count * other for count, other in zip(counts, others, strict=True)]
    copies = rows.expand(group.ranks - 1, *rows.shape).flatten(0, 1)
    return begin_rows(group, copies, send, receive, "weights")


def _as_bytes(rows: Tensor) -> Tensor:
    """Return rows as a uint8 view (rows, bytes of a row), because gloo does not support bfloat16."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
