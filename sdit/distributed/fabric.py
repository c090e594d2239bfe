"""Measures the process group of a launch: the first collective, and the speed between pairs and among all ranks."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from sdit.distributed.comm import Comm

ALL_PAIRS_RANKS = 16
PING_BYTES, PINGS = 8, 10
PAIR_BYTES, GROUP_BYTES, REPEATS = 1 << 22, 1 << 24, 3
TURNS = 8  # of work and a collective
Pair = tuple[int, int]
Work = Callable[[], Any]  # a collective, or other work of the device


def rounds_of_pairs(world: int) -> list[list[Pair]]:
    """Return the pairs of ranks to measure, in rounds. The pairs of a round are measured at the same time.

    Up to 16 ranks, each round is one pair and all pairs are measured. Beyond 16 ranks, the pairs of a round are 1, 2, 4, ...
    ranks apart, so that each rank is in most rounds.
    """
    if world <= ALL_PAIRS_RANKS:
        return [[(a, b)] for a in range(world) for b in range(a + 1, world)]
    steps = [1 << step for step in range((world - 1).bit_length())]
    return [[(a, a + step) for a in range(world - step) if a // step % 2 == 0] for step in steps]


def measure_first_collective(comm: Comm) -> None:
    """Run one all-reduce, which opens connections and loads kernels."""
    comm.sum(torch.ones(1, device=comm.device))
    settle(comm.device)


def measure_pairs(comm: Comm) -> list[dict[str, Any]]:
    """Return `ranks`, `latency_seconds` and `bytes_per_second` of each pair, on all ranks.

    The latency is half a round trip of 8 bytes.
    """
    found = []
    for pairs in rounds_of_pairs(comm.world):
        comm.barrier()
        mine = next((pair for pair in pairs if comm.rank in pair), None)
        if mine is None:
            continue
        latency = _ping(comm, mine, PING_BYTES, PINGS) / 2
        bandwidth = 2 * PAIR_BYTES / _ping(comm, mine, PAIR_BYTES, REPEATS)
        if comm.rank == mine[0]:
            found.append({"ranks": list(mine), "latency_seconds": latency, "bytes_per_second": bandwidth})
    return [pair for pairs in comm.gather(found) for pair in pairs]


def measure_groups(comm: Comm) -> dict[str, float]:
    """Return the bytes per second that each rank sends in an all-reduce and in an all-to-all of all W ranks.

    An all-reduce sends 2 (W - 1) / W of the buffer, an all-to-all sends (W - 1) / W.
    """
    fraction = (comm.world - 1) / comm.world
    numel = GROUP_BYTES // 4 // comm.world * comm.world
    values, received = torch.zeros(numel, device=comm.device), torch.empty(numel, device=comm.device)
    reduce_seconds = median_seconds(comm, lambda: dist.all_reduce(values))
    exchange_seconds = median_seconds(comm, lambda: dist.all_to_all_single(received, values))
    moved = 4 * numel * fraction
    return {
        "all_reduce_bytes_per_second": 2 * moved / reduce_seconds,
        "all_to_all_bytes_per_second": moved / exchange_seconds,
        "bytes": float(4 * numel),
    }


def measure_link(comm: Comm, groups: Sequence[Sequence[int]], work: Work) -> dict[str, tuple[float, float]]:
    """Return (bytes per second that a rank sends, fixed seconds between two ranks) of each collective in groups of ranks.

    All groups run at the same time, as in training. They have equally many ranks, at least 2, and this rank is in one. The
    fixed time of a reduction and a gather grows with log2 of the ranks. It is the time that a collective without data adds to
    ranks that do `work` before it, and at least its time without that work.
    """
    made = {tuple(ranks): dist.new_group(list(ranks)) for ranks in groups}
    ranks, group = next((ranks, group) for ranks, group in made.items() if comm.rank in ranks)
    found, working = {}, slowest_seconds(comm, _turns(work))
    for name, sent_fraction, messages in (
        ("all_to_all", 1.0, 1.0),
        ("all_reduce", 2.0, math.log2(len(ranks))),
        ("all_gather", 1.0, math.log2(len(ranks))),
    ):
        empty, full = (_collective(name, group, comm, len(ranks), n) for n in (1, GROUP_BYTES // 4))
        small, large = slowest_seconds(comm, empty), slowest_seconds(comm, full)
        added = (slowest_seconds(comm, _turns(work, empty)) - working) / TURNS
        moved = sent_fraction * (len(ranks) - 1) / len(ranks) * 4 * (GROUP_BYTES // 4 // len(ranks) * len(ranks))
        found[name] = (moved / max(large - small, 1e-9), max(small, added) / messages)
    return found


def _turns(*actions: Work) -> Callable[[], None]:
    """Return a function that runs the actions in turns."""

    def run() -> None:
        for _ in range(TURNS):
            for action in actions:
                action()

    return run


def _collective(name: str, group: Any, comm: Comm, ranks: int, numel: int) -> Work:
    """Return a function that runs a collective on a buffer of about `numel` float32 numbers."""
    part = max(1, numel // ranks)
    whole, other = torch.zeros(part * ranks, device=comm.device), torch.zeros(part * ranks, device=comm.device)
    operations: dict[str, Work] = {
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, other[:part], group=group),
    }
    return operations[name]


def describe_device(device: torch.device) -> str:
    """Return the name of the device. For a GPU its memory in GiB is added."""
    if device.type != "cuda":
        return "CPU"
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"


def place_from_mpi(address: str, port: int) -> tuple[str, int]:
    """Return rank 0's address and port on all ranks of an MPI launch. They are exchanged through MPI, which is then closed."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    endpoint = MPI.COMM_WORLD.bcast((address, port), root=0)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = endpoint[0], str(endpoint[1])
    MPI.Finalize()
    return endpoint[0], endpoint[1]


def _ping(comm: Comm, pair: Pair, size_bytes: int, times: int) -> float:
    """Return the median seconds of a round trip of `size_bytes` between the two ranks of a pair."""
    box = torch.zeros(size_bytes, dtype=torch.uint8, device=comm.device)
    other = pair[1] if comm.rank == pair[0] else pair[0]
    order = (dist.isend, dist.irecv) if comm.rank == pair[0] else (dist.irecv, dist.isend)
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        for transfer in order:
            _transfer(transfer, box, other)
        settle(comm.device)
        taken.append(time.perf_counter() - started)
    return max(statistics.median(taken[1:]), 1e-9)  # the first round trip opens the connection


def _transfer(transfer: Callable[..., Any], box: torch.Tensor, other: int) -> None:
    """Send `box` to another rank or receive it, over the communicator of all ranks.

    Outside a batch, NCCL would make a communicator for each pair, which takes up to a second and device memory.
    """
    for work in dist.batch_isend_irecv([dist.P2POp(transfer, box, other)]):
        work.wait()


def median_seconds(comm: Comm, work: Work) -> float:
    """Return the median seconds of a collective or other work of the device, which all ranks start together.

    The first time is not counted.
    """
    return max(statistics.median(_seconds(comm, work, REPEATS)), 1e-9)


def slowest_seconds(comm: Comm, work: Work, repeats: int = REPEATS) -> float:
    """Return the median of the seconds of the slowest rank, on all ranks. A step waits for it at each collective.

    Where more ranks than cores share a node, ranks with equal work do not end together, and their mean is too small.
    """
    seconds = torch.tensor(_seconds(comm, work, repeats), dtype=torch.float64, device=comm.device)
    return max(statistics.median(comm.largest(seconds).tolist()), 1e-9)


def _seconds(comm: Comm, work: Work, repeats: int) -> list[float]:
    """Return this rank's seconds of each repetition but the first."""
    taken = []
    for _ in range(repeats + 1):
        comm.barrier()
        started = time.perf_counter()
        work()
        settle(comm.device)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def settle(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
