"""Ranks that are threads of one process, and what they save: for tests of checkpoints that need many ranks and no gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sdit.checkpoint.saver import Saver
from sdit.checkpoint.store import CheckpointStore, Snapshot
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.launch_environment import RankInfo

ELEMENTS = 1 << 16  # 256 KiB a rank
SAVES = 12


class Group:
    """A process group of threads: what all ranks put in, all take out."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=60)
        self.values: list[Any] = [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class ThreadRank:
    """One rank of such a group."""

    device = torch.device("cpu")

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self.rank, self.world, self.is_first = group, rank, group.world, rank == 0
        self.info = RankInfo(rank, group.world, rank, group.world, "test")

    def gather(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, value)

    def first_reports(self, value: Any, most: int) -> dict[int, Any]:
        values = enumerate(self._group.exchange(self.rank, value))
        return dict([(rank, value) for rank, value in values if value is not None][:most])

    def among(self, ranks: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        everyone = self._group.exchange(self.rank, values.clone())
        return torch.stack([everyone[rank] for rank in ranks])

    def from_first(self, value: Any) -> Any:
        return self._group.exchange(self.rank, value)[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._group.exchange(self.rank, values.clone())).sum(0)


def on_ranks(world: int, work: Callable[[Comm], None]) -> None:
    """Run `work` on every rank. Raises: the first rank's error."""
    group, errors = Group(world), list[BaseException]()

    def run(rank: int) -> None:
        try:
            work(cast(Comm, ThreadRank(group, rank)))
        except BaseException as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise next((each for each in errors if not isinstance(each, threading.BrokenBarrierError)), errors[0])


def snapshot(images: int, rank: int = 0) -> Snapshot:
    values = np.random.default_rng((images, rank)).normal(size=ELEMENTS).astype(np.float32)
    facts = {"clock": {"images_seen": images, "steps": 1}, "config": {}}
    return Snapshot(images, {f"weight/w{rank}@0": values}, {f"weight/w{rank}": (ELEMENTS,)}, facts)


def save_all(folder: Path, comm: Comm, asynchronous: bool, saves: int = SAVES) -> tuple[list[str], list[str]]:
    """Save many moments; return the names that were committed and the texts of the failures."""
    saved: list[str] = []
    failed: list[str] = []
    moment = [0]
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2), comm)
    saver = Saver(
        store, comm, lambda: snapshot(moment[0], comm.rank), asynchronous,
        lambda path, _: saved.append(path.name), failed.append,
    )  # fmt: skip
    for number in range(1, saves + 1):
        moment[0] = 10 * number
        saver.save()
        saver.finish()
    return saved, failed


def node_ranks(world: int, ranks_per_node: int, work: Callable[[Comm], None]) -> None:
    """Run `work` on every rank of nodes with `ranks_per_node` ranks each."""

    def place(comm: Comm) -> None:
        comm.info = RankInfo(comm.rank, world, comm.rank % ranks_per_node, ranks_per_node, "test")
        work(comm)

    on_ranks(world, place)


def node_store(folder: Path, comm: Comm) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(files="node"), comm)
