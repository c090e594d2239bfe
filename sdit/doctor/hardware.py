"""Measures a hardware file for `sdit plan --simulate` on the ranks of a launch."""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from pathlib import Path

from sdit.distributed.comm import Comm
from sdit.distributed.fabric import describe_device, measure_link
from sdit.doctor.device_speed import GIGA, block_work, measure_device
from sdit.doctor.facts import durable_write_seconds
from sdit.doctor.host_speed import measure_host
from sdit.planner.hardware import Collective, Device, Hardware, Link, Storage

FILE_BYTES = 1 << 25
ASSUMED_MTBF_HOURS = 6330.0  # of the hardware files that come with sdit


def measure_hardware(comm: Comm, folder: Path, threads: int | None) -> Hardware:
    """Return the figures of this launch's ranks, on all of them. `folder` is on the file system of checkpoints.

    On one node, the link between nodes is not measured and gets the figures of the link inside. A single rank has no link:
    both get the speed of copies in its memory.

    `threads` are the CPU threads of a rank, as `parallel.threads`.

    Raises: OSError: if no file can be written in the folder.
    """
    device, nodes = measure_device(comm), _ranks_by_node(comm)
    one_rank = _copies(device)
    inside, between = _links(comm, nodes, one_rank)
    storage = _measure_storage(comm, folder, len(nodes))
    measured = f"measured by sdit doctor on {comm.world} ranks, {len(nodes)} nodes: {describe_device(comm.device)}"
    assumed = ["node_mtbf_hours", "host.restart_seconds", "host.step_microseconds_per_rank"]
    assumed += ["inside: no two ranks share a node"] if inside is None else []
    assumed += ["between: there is one node"] if between is None else []
    where = socket.gethostname() if len(nodes) == 1 else f"{len(nodes)} nodes"
    return Hardware(
        name=f"{where}, {comm.world} ranks",
        sources=[measured, f"not measured: {'; '.join(assumed)}"],
        device=device,
        inside=inside or between or one_rank,
        between=between or inside or one_rank,
        storage=storage,
        host=measure_host(comm, folder, threads),
        node_mtbf_hours=ASSUMED_MTBF_HOURS,
        price_per_device_hour=None,
    )


def _ranks_by_node(comm: Comm) -> list[list[int]]:
    """Return the ranks of each node."""
    nodes: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(comm.gather(socket.gethostname())):
        nodes[host].append(rank)
    return list(nodes.values())


def _links(comm: Comm, nodes: list[list[int]], one_rank: Link) -> tuple[Link | None, Link | None]:
    """Return the link inside nodes and the link between them, or None for what is not there.

    Ranks of different nodes are measured as training uses them: all ranks of a node at the same time, each with the ranks of
    the same index on the other nodes. On uneven nodes, all ranks together stand for the link between nodes.
    """
    even = len({len(ranks) for ranks in nodes}) == 1
    inside = _link(comm, nodes) if even and len(nodes[0]) > 1 else None
    if len(nodes) == 1:
        return inside, None
    groups = [list(ranks) for ranks in zip(*nodes, strict=True)] if even else [list(range(comm.world))]
    return inside, _link(comm, groups)


def _link(comm: Comm, groups: list[list[int]]) -> Link:
    measured = measure_link(comm, groups, block_work(comm))
    return Link(**{name: _collective(*figures) for name, figures in measured.items()})


def _copies(device: Device) -> Link:
    """Return the link of a rank with itself."""
    copy = Collective(gigabytes_per_second=device.memory_gigabytes_per_second / 2, fixed_microseconds=0.0)
    return Link(all_to_all=copy, all_reduce=copy, all_gather=copy)


def _collective(bytes_per_second: float, fixed_seconds: float) -> Collective:
    return Collective(gigabytes_per_second=bytes_per_second / GIGA, fixed_microseconds=1e6 * fixed_seconds)


def _measure_storage(comm: Comm, folder: Path, nodes: int) -> Storage:
    """Return the speed of durable writes by all ranks at the same time."""
    data = os.urandom(FILE_BYTES)
    comm.barrier()
    seconds = durable_write_seconds(folder, data)
    total = comm.world * FILE_BYTES / max(comm.gather(seconds)) / GIGA
    return Storage(node_gigabytes_per_second=total / nodes, total_gigabytes_per_second=total)
