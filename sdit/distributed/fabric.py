"""What the process group of a launch can do: time to the first collective, and speed between all pairs and among all ranks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sdit.distributed.comm import Comm

ALL_PAIRS_RANKS = 16
PING_BYTES, PINGS = 8, 10
PAIR_BYTES, GROUP_BYTES, REPEATS = 1 << 22, 1 << 24, 3
Pair = tuple[int, int]


def rounds_of_pairs(world: int) -> list[list[Pair]]:
    """The pairs to measure, in rounds. Up to 16 ranks all pairs, one at a time; beyond those, pairs 1, 2, 4, ... places
    apart, all of a round at once, so that every rank takes part in most rounds."""
    if world <= ALL_PAIRS_RANKS:
        return [[(a, b)] for a in range(world) for b in range(a + 1, world)]
    steps = [1 << step for step in range((world - 1).bit_length())]
    return [[(a, a + step) for a in range(world - step) if a // step % 2 == 0] for step in steps]


def measure_first_collective(comm: Comm) -> None:
    """One all-reduce: connections are made and kernels loaded here."""
    comm.sum(torch.ones(1, device=comm.device))
    _settle(comm.device)


def measure_pairs(comm: Comm) -> list[dict[str, Any]]:
    """`ranks`, `latency_seconds` (half a round trip of 8 bytes) and `bytes_per_second` of every pair, on all ranks."""
    found = []
    for pairs in rounds_of_pairs(comm.world):
        comm.barrier()
        mine = next((pair for pair in pairs if comm.rank in pair), None)
        if mine is None:
            continue
        latency, bandwidth = (
            _ping(comm, mine, PING_BYTES, PINGS) / 2,
            2 * PAIR_BYTES / _ping(comm, mine, PAIR_BYTES, REPEATS),
        )
        if comm.rank == mine[0]:
            found.append({"ranks": list(mine), "latency_seconds": latency, "bytes_per_second": bandwidth})
    return [pair for part in comm.gather(found) for pair in part]


def measure_groups(comm: Comm) -> dict[str, float]:
    """Bytes per second that each rank moves in an all-reduce (2 (W - 1) / W of its buffer) and an all-to-all ((W - 1) / W)."""
    share = (comm.world - 1) / comm.world
    numel = GROUP_BYTES // 4 // comm.world * comm.world
    values, received = torch.zeros(numel, device=comm.device), torch.empty(numel, device=comm.device)
    reduce_seconds = _seconds(comm, lambda: dist.all_reduce(values))
    exchange_seconds = _seconds(comm, lambda: dist.all_to_all_single(received, values))
    moved = 4 * numel * share
    return {
        "all_reduce_bytes_per_second": 2 * moved / reduce_seconds,
        "all_to_all_bytes_per_second": moved / exchange_seconds,
        "bytes": float(4 * numel),
    }


def describe_device(device: torch.device) -> str:
    """Name of the device, and its memory in GiB where it has its own."""
    if device.type != "cuda":
        return "CPU"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def place_from_mpi(address: str, port: int) -> tuple[str, int]:
    """Rank 0's address and port on all ranks of an MPI launch, exchanged through MPI, which is left again at once."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    place = MPI.COMM_WORLD.bcast((address, port), root=0)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place[0], str(place[1])
    MPI.Finalize()
    return place[0], place[1]


def _ping(comm: Comm, pair: Pair, size_bytes: int, times: int) -> float:
    """Median seconds of a round trip of `size_bytes` between the two ranks of a pair."""
    box = torch.zeros(size_bytes, dtype=torch.uint8, device=comm.device)
    other = pair[1] if comm.rank == pair[0] else pair[0]
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        order: tuple[Callable[..., Any], ...] = (
            (dist.send, dist.recv) if comm.rank == pair[0] else (dist.recv, dist.send)
        )
        for transfer in order:
            transfer(box, other)
        _settle(comm.device)
        taken.append(time.perf_counter() - started)
    return max(statistics.median(taken[1:]), 1e-9)  # the first makes the connection


def _seconds(comm: Comm, collective: Callable[[], Any]) -> float:
    """Median seconds of a collective that all ranks begin together."""
    taken = []
    for _ in range(REPEATS + 1):
        comm.barrier()
        started = time.perf_counter()
        collective()
        _settle(comm.device)
        taken.append(time.perf_counter() - started)
    return max(statistics.median(taken[1:]), 1e-9)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
