"""As one rank: the collectives of `Comm` whose cost does not grow with the ranks, compared with lists of all ranks."""

from __future__ import annotations

import os

import torch

from sdit.cli.process import leave
from sdit.distributed.comm import Comm, find_rank


def check(comm: Comm) -> None:
    rank, world = comm.rank, comm.world
    for count in (1, world - 1, world, 3 * world - 1):
        rows = (torch.arange(-(-count // world)) * world + rank)[:, None].repeat(1, 2)  # row i of rank r is i W + r
        ordered = comm.interleave_on_first(rows, count)
        assert ordered.tolist() == ([[row, row] for row in range(count)] if rank == 0 else [])
    for size in (1, 2, world):
        mates = list(range(rank // size * size, min(rank // size * size + size, world)))
        assert comm.among(mates, torch.tensor([rank, -rank])).tolist() == [[mate, -mate] for mate in mates]
    own = None if rank % 2 == 0 else f"rank {rank}"
    for most in (1, 2, 9):
        wanted = [each for each in comm.gather([rank, own]) if each[1] is not None][:most]
        assert comm.first_reports(own, most) == dict(wanted)
    assert comm.first_reports(None, 4) == {}
    assert comm.largest(torch.tensor([rank, -rank])).tolist() == [world - 1, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Comm(find_rank(os.environ), timeout_seconds=120) as comm:
        check(comm)
    leave(0)
