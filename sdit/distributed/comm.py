"""The process group of a run and the collectives that the trainer uses."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from sdit.distributed.device import Device, check_accelerator, choose_device
from sdit.errors import ConfigError
from sdit.launch_environment import RankInfo, find_rank, is_loopback

__all__ = ["Comm", "RankInfo", "find_rank", "set_threads"]
LOOPBACK = "127.0.0.1"
LOOPBACK_CARD = "lo"
OPEN_MPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"
SCHEME = "sdit"  # URL scheme of the rendezvous handler below
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class Comm:
    """The run's process group, which is created unless the process has one. `close()`, or the end of the `with`, destroys it.

    `timeout_seconds` limits the rendezvous and each collective. `backend` None: NCCL for GPUs, and gloo for CPUs. NCCL refuses
    two ranks on one GPU, gloo does not.
    """

    def __init__(
        self,
        info: RankInfo,
        timeout_seconds: float = 600.0,
        device: Device = "auto",
        backend: Literal["nccl", "gloo"] | None = None,
    ) -> None:
        self.info = info
        self.rank, self.world = info.rank, info.world
        self.device = choose_device(info, device)
        if dist.is_initialized():  # a simulation's
            return
        self._init_group(timeout_seconds, backend or ("nccl" if self.device.type == "cuda" else "gloo"))

    def _init_group(self, timeout_seconds: float, backend: str) -> None:
        _set_rendezvous(self.info, self.device)
        if is_loopback(os.environ["MASTER_ADDR"]) and any(name == LOOPBACK_CARD for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_CARD)
        if self.is_first:
            rendezvous = (
                f"rendezvous at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, " if self.world > 1 else ""
            )
            print(f"ranks: {self.info.describe()}; {rendezvous}{backend}", file=sys.stderr, flush=True)
        from deepspeed import comm as deepspeed_comm

        check_accelerator(self.device)
        # DeepSpeed would compile a shared-memory all-reduce here, which needs a C++ compiler. A process that is killed during
        # the build leaves a lock, and all later runs hang. gloo does the same work.
        # sys.modules is used because the attribute deepspeed.comm.torch is the torch package.
        sys.modules["deepspeed.comm.torch"].__dict__["build_shm_op"] = lambda: None
        deepspeed_comm.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_seconds),
            init_method=None if _has_agent_store() else f"{SCHEME}://",
            rank=self.rank,
            world_size=self.world,
            verbose=False,
        )

    def __enter__(self) -> Comm:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Destroy the group. After an error under NCCL, leave that to the end of the process.

        NCCL's ranks destroy a group together, and the others wait in another collective.
        """
        waits = dist.is_initialized() and dist.get_backend() == "nccl"
        if error is None or not waits:
            self.close()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce `values` in place by addition and return it."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def smallest(self, value: int) -> int:
        """Return the smallest `value` of all ranks."""
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box.item())

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce `values` in place by their element-wise maximum and return it."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def first_reports(self, value: Any, most: int) -> dict[int, Any]:
        """Return the `value` of the first `most` ranks whose value is not None, by rank, on all ranks (JSON types only).

        A rank receives the reports that are returned and a few bytes for each. Nothing grows with the ranks.
        """
        found: dict[int, Any] = {}
        while len(found) < most:
            reports = value is not None and self.rank > max(found, default=-1)
            rank = self.smallest(self.rank if reports else self.world)
            if rank == self.world:
                break
            found[rank] = self.from_rank(rank, value)
        return found

    def interleave(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather equally many rows (n, ...) of each rank. Row i of rank r becomes row i * world + r."""
        gathered = self._all_gathered(rows)
        return gathered.transpose(0, 1).flatten(0, 1)

    def interleave_on_first(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return the first `count` rows of `interleave` on rank 0, and no rows on the others. Only these rows are sent."""
        senders = [range(rank, count, self.world) for rank in range(min(self.world, count))]
        send, receive = [0] * self.world, [0] * self.world
        send[0] = len(senders[self.rank]) if self.rank < len(senders) else 0
        if self.is_first:
            receive[: len(senders)] = map(len, senders)
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows[: send[0]].contiguous(), receive, send)
        ordered = torch.empty_like(received)
        if self.is_first:
            ordered[[row for rank in senders for row in rank]] = received
        return ordered

    def among(self, ranks: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        """Return (len(ranks), n): the `values` (n,) of some ranks, which are sent to these ranks only.

        All ranks call it at the same time, each with the ranks of its own set.
        """
        splits = [0] * self.world
        for rank in ranks:
            splits[rank] = len(values)
        received = values.new_empty(len(ranks) * len(values))
        dist.all_to_all_single(received, values.repeat(len(ranks)), splits, splits)
        return received.view(len(ranks), -1)

    def from_rank_before(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, ...) of rank r - 1 on rank r, and those of the last rank on rank 0. All have equally many."""
        if self.world == 1:
            return rows
        received, send, receive = torch.empty_like(rows), [0] * self.world, [0] * self.world
        send[(self.rank + 1) % self.world] = receive[(self.rank - 1) % self.world] = len(rows)
        dist.all_to_all_single(received, rows.contiguous(), receive, send)
        return received

    def from_first(self, value: Any) -> Any:
        """Return rank 0's `value` on each rank (JSON types only, nothing is unpickled)."""
        return self.from_rank(0, value)

    def from_rank(self, rank: int, value: Any) -> Any:
        """Return the `value` of one rank on each rank (JSON types only)."""
        data = json.dumps(value).encode() if self.rank == rank else b""
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, rank)
        box = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.rank == rank:
            box.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if box.numel():
            dist.broadcast(box, rank)
        return json.loads(_bytes(box))

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Return the `value` of each rank of a group (None: all), in rank order, on its ranks (JSON types only).

        A rank receives as many values as the group has ranks, so a run gathers from all ranks only while it starts.
        """
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=self.device)
        sizes[dist.get_rank(group)] = data.numel()
        dist.all_reduce(sizes, group=group)
        padded = torch.zeros(int(sizes.max().item()), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = self._all_gathered(padded, group)
        return [json.loads(_bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def _all_gathered(self, values: torch.Tensor, group: Any = None) -> torch.Tensor:
        """Return (ranks, ...): the `values` (...) of each rank of a group, of equal shape on all of them."""
        gathered = values.new_empty((dist.get_world_size(group), *values.shape))
        _all_gather(gathered.flatten(0, 1) if values.dim() else gathered, values.contiguous(), group=group)
        return gathered


def _bytes(values: torch.Tensor) -> bytes:
    """Return the content of a uint8 tensor."""
    return values.cpu().numpy().tobytes()


def _set_rendezvous(info: RankInfo, device: torch.device) -> None:
    """Set the environment variables that DeepSpeed reads. A single process needs no port.

    DeepSpeed takes the local rank as the index of the GPU, and refuses another local rank of Open MPI.

    Raises: ConfigError: if the address or port of rank 0 is needed and not set.
    """
    index = str(info.local_rank if device.index is None else device.index)
    os.environ.update(
        RANK=str(info.rank), WORLD_SIZE=str(info.world), LOCAL_RANK=index, LOCAL_SIZE=str(info.local_world)
    )
    if OPEN_MPI_LOCAL_RANK in os.environ:
        os.environ[OPEN_MPI_LOCAL_RANK] = index
    on_one_node = info.world == 1 or (info.local_world == info.world and not _has_agent_store())
    if on_one_node and not is_loopback(os.environ.get("MASTER_ADDR", "")):
        os.environ["MASTER_ADDR"] = LOOPBACK
    needed = ("MASTER_ADDR", "MASTER_PORT") if info.world > 1 or _has_agent_store() else ()
    for name in needed:
        if name not in os.environ:
            raise ConfigError(
                f"{name} is not set; under {info.source} with {info.world} ranks it must name rank 0's host and port"
            )


def _has_agent_store() -> bool:
    """Return True if torchrun's agent runs the store at MASTER_PORT, as it does for ranks without a supervisor."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _rendezvous(
    _url: str, timeout: timedelta = timedelta(minutes=30), **_: object
) -> Iterator[tuple[dist.Store, int, int]]:
    """Yield the store of a new process group, this rank, and the number of ranks, as torch.distributed expects.

    torch's own store listens on all addresses. This one listens only on MASTER_ADDR if that is a loopback address. A single
    rank needs no listener.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        yield dist.HashStore(), rank, world
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = None
    if rank == 0 and is_loopback(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048).detach()  # torch closes it
    yield dist.TCPStore(host, port, world, rank == 0, timeout, master_listen_fd=listener), rank, world


dist.register_rendezvous_handler(SCHEME, _rendezvous)


def set_threads(info: RankInfo, threads: int | None) -> int:
    """Set the number of CPU threads to this rank's share of the node's cores, or to `threads`, and return it."""
    cores = len(os.sched_getaffinity(0))
    share = threads or max(1, cores // max(1, info.local_world))
    torch.set_num_threads(share)
    logging.getLogger(__name__).debug("rank %d: %d CPU threads", info.rank, share)
    return share
