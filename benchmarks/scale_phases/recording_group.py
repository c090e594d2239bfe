"""A process group of W ranks in one process. It records collectives, and answers as if all ranks had sent what this one sends.

A sum of a vector with one element per rank is the vector in which all elements are this rank's: each rank fills its own.
What rank 0 broadcasts is recorded, and another rank that is driven after it receives that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdit.distributed.comm import Comm
from sdit.launch_environment import RankInfo

BACKEND = "recording"
_ProcessGroup: Any = dist.ProcessGroup  # its stubs have overloads that a subclass in Python does not have


class _Done(dist._Work):
    """A collective that has ended."""

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        return True


class RecordingGroup(_ProcessGroup):  # type: ignore[misc]
    """Counts collectives, and the bytes that this rank receives in them."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self._rank, self._world = rank, world
        self._messages, self._received_bytes = 0, 0.0
        self._broadcasts: list[Tensor] = []

    def replay(self, broadcasts: list[Tensor]) -> None:
        """Append what rank 0 broadcasts to a list, or receive it from there on another rank."""
        self._broadcasts = broadcasts

    def getBackendName(self) -> str:
        return BACKEND

    def take(self) -> tuple[int, float]:
        """Return the number of collectives and the bytes received since the last call."""
        taken, self._messages, self._received_bytes = (self._messages, self._received_bytes), 0, 0.0
        return taken

    def _record(self, tensor: Tensor) -> _Done:
        self._messages += 1
        self._received_bytes += tensor.numel() * tensor.element_size()
        return _Done()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        for tensor in tensors:
            if tensor.numel() == self._world > 1 and tensor.dim() == 1:
                tensor.fill_(tensor[self._rank].item())
            elif opts is not None and opts.reduceOp == dist.ReduceOp.SUM:
                tensor.mul_(self._world)
        return self._record(tensors[0])

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        if self._rank == 0:
            self._broadcasts.append(tensors[0].clone())
        else:
            tensors[0].copy_(self._broadcasts.pop(0))
        return self._record(tensors[0])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Done:
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self._record(torch.empty(self._world * inputs[0].numel(), dtype=inputs[0].dtype, device="meta"))

    def _allgather_base(self, output: Tensor, value: Tensor, opts: Any = None) -> _Done:
        output.view(self._world, -1).copy_(value.reshape(1, -1).expand(self._world, -1))
        return self._record(output)

    all_gather_single = _allgather_base  # its name from torch 2.13 on

    def alltoall_base(
        self, output: Tensor, value: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> _Done:
        output.zero_()
        numel = min(output.numel(), value.numel())
        output.view(-1)[:numel].copy_(value.reshape(-1)[:numel])
        return self._record(output)

    def barrier(self, opts: Any = None) -> _Done:
        return self._record(torch.empty(0))


dist.Backend.register_backend(
    BACKEND, lambda _store, rank, world, _timeout: RecordingGroup(rank, world), devices=["cpu"]
)


@contextmanager
def recording_comm(rank: int, world: int, local_world: int) -> Iterator[tuple[Comm, RecordingGroup]]:
    """Yield a rank's `Comm`, and the group below it that counts."""
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world)
    try:
        group = dist.distributed_c10d._get_default_group()
        found = group if isinstance(group, RecordingGroup) else group._get_backend(torch.device("cpu"))
        assert isinstance(found, RecordingGroup)
        yield Comm(RankInfo(rank, world, rank % local_world, local_world, "simulation"), device="cpu"), found
    finally:
        dist.destroy_process_group()
