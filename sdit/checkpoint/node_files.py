"""Where each rank writes its shard: in a file of its own, or in one file together with the other ranks of its node."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence

import torch

from sdit.checkpoint.files import SHARED_SUFFIX, ShardPlace
from sdit.distributed.comm import Comm


def nodes_of(members: Sequence[tuple[str, int]]) -> list[int]:
    """Return the node of each rank, given host and local rank of each. Nodes are counted in the order of their first ranks.

    A launcher can start several nodes on one host. Then a local rank occurs there several times.
    """
    seen, numbers, nodes = Counter[tuple[str, int]](), dict[tuple[str, int], int](), list[int]()
    for host, local_rank in members:
        key = (host, seen[host, local_rank])
        seen[host, local_rank] += 1
        nodes.append(numbers.setdefault(key, len(numbers)))
    return nodes


def places_of(nodes: Sequence[int], sizes: Sequence[int]) -> list[ShardPlace]:
    """Return the place of each rank's shard in its node's file, given the node and the bytes of each rank.

    The shards of a node are stored one after another, by rank.
    """
    totals, starts = Counter[int](), list[int]()
    for node, size in zip(nodes, sizes, strict=True):
        starts.append(totals[node])
        totals[node] += size
    return [
        ShardPlace(f"node-{n:05d}{SHARED_SUFFIX}", start, totals[n]) for n, start in zip(nodes, starts, strict=True)
    ]


class Nodes:
    """The nodes of a run: the node of each rank (`of_rank`), the number of this rank's node (`own`), and its ranks (`mates`).

    All ranks create it together while the run starts, which gathers a host name from each rank.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        members = comm.gather([socket.gethostname(), comm.info.local_rank])
        self.of_rank = nodes_of([(host, local_rank) for host, local_rank in members])
        self.own = self.of_rank[comm.rank]
        self.mates = [rank for rank, node in enumerate(self.of_rank) if node == self.own]

    def place(self, size: int) -> ShardPlace:
        """Return where this rank writes its shard of `size` bytes in the file of its node. All ranks call it together."""
        sizes = self._comm.among(self.mates, torch.tensor([size], dtype=torch.int64, device=self._comm.device))
        places = places_of([self.own] * len(self.mates), sizes.flatten().tolist())
        return places[self.mates.index(self._comm.rank)]
