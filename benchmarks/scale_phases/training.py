"""The training processes of W virtual ranks: start, planning of a step, logging, a checkpoint, and its restore elsewhere.

Rank 0 and the last rank are driven. The figures of all ranks are computed from them. Only the shards of a checkpoint are
written for all ranks, because rank 0 commits them and readers open them. A shard has two tensors of a few numbers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from host import Case, plan_times

from scale_phases.counting import CountedFolder, Counts
from scale_phases.recording_group import RecordingGroup, recording_comm
from scale_phases.supervision import RANKS_PER_NODE
from scale_phases.table import Phase
from sdit.checkpoint import store as store_module
from sdit.checkpoint.node_files import Nodes
from sdit.checkpoint.shard_set import ShardSet
from sdit.checkpoint.store import CheckpointStore, Problem, Snapshot
from sdit.clock import Clock
from sdit.config import CheckpointConfig, Config
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError
from sdit.expert_parallel.migration import migrate
from sdit.observe.metrics_file import MetricsFile
from sdit.observe.rank_log import RankLog
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.worker import WorkerContext
from sdit.topology import ExpertGroups
from sdit.train.rank_work import rank_report, work_share
from sdit.train.record import StepRecord
from sdit.train.run_start import find_newest, open_run_folder
from sdit.train.sums import BINS, FLAGS, PARTS, host_share, pack, unpack
from tests.unit.expert_parallel.virtual_experts import VirtualExperts

ELEMENTS = 16  # of a tensor in a shard
IMAGES = 1000
EXPERT_RANKS, EXPERTS, BLOCKS = 8, 16, 2
GRID_IMAGES = 64


@dataclass
class Driven:
    """One rank that is driven: its `Comm`, and the group that counts."""

    rank: int
    comm: Comm
    group: RecordingGroup


def train_ranks(world: int, root: Path) -> Iterator[Phase]:
    """Yield the phases of the training processes of `world` ranks, whose run folder is below `root`."""
    run_dir = root / "run"
    (run_dir / "logs").mkdir(parents=True)
    folder = CountedFolder(run_dir)
    logging.disable(logging.WARNING)
    with folder.counting():
        yield _driven("ranks start", world, folder, lambda each: _start(each, run_dir))
        yield _plan(world)
        yield _driven("logged step", world, folder, lambda each: _log_step(each, run_dir))
        yield _driven("move of experts", world, folder, _move_experts)
        yield _driven("sample grid", world, folder, _share_grid)
        with mock.patch.object(store_module, "Nodes", VirtualNodes):
            yield from _save(world, folder, run_dir)
            yield _driven("checkpoint, place in a node's file", world, folder, lambda each: _place(each, run_dir))
            yield _driven("checkpoint, failed", world, folder, lambda each: _fail(each, run_dir))
        for name, reader in (("restore, same ranks", world), ("restore, half the ranks", max(1, world // 2))):
            yield _driven(name, reader, folder, lambda each: _restore(each, run_dir, world), shown=world)


def _driven(
    name: str, world: int, folder: CountedFolder, action: Callable[[Driven], object], shown: int | None = None
) -> Phase:
    """Run an action on rank 0 and on the last rank, and return the phase."""
    counts: dict[int, Counts] = {}
    host: dict[int, float] = {}
    messages: list[tuple[int, float]] = []
    broadcasts: list[torch.Tensor] = []
    for rank in sorted({0, world - 1}):
        with recording_comm(rank, world, min(RANKS_PER_NODE, world)) as (comm, group):
            group.replay(broadcasts)
            folder.take()
            folder.owner = rank
            started = time.thread_time()
            action(Driven(rank, comm, group))
            host[rank] = time.thread_time() - started
            counts |= folder.take()
            messages.append(group.take())
    most = max(messages, key=lambda taken: taken[1])
    phase = Phase.of(name, world, RANKS_PER_NODE, 0.0, counts, host, most)
    return phase if shown is None else Phase(**{**vars(phase), "ranks": shown})


def _start(each: Driven, run_dir: Path) -> None:
    """Agree on the layout of the nodes, on the run folder, and on the checkpoint to start from."""
    each.comm.gather(each.comm.info.local_world)
    with open_run_folder(each.comm, str(run_dir), WorkerContext.from_environment({})) as folder:
        find_newest(folder, CheckpointConfig(), each.comm)


def _plan(world: int) -> Phase:
    """Plan a micro-step of S/2 with 16 experts. EP is 8, or the number of ranks if there are fewer."""
    milliseconds, _ = plan_times(Case("S/2", 16, min(8, world), world), repeats=3)
    seconds = milliseconds / 1000
    return Phase.of("plan of a step", world, RANKS_PER_NODE, 0.0, {}, {0: seconds, 1: seconds})


def _log_step(each: Driven, run_dir: Path) -> None:
    """Sum the losses and flags of a step, compare the work of the ranks, and write the record on rank 0."""
    parts = torch.ones(len(PARTS), dtype=torch.float64)
    host = host_share((0.0,) * len(FLAGS), work_share(1.0))
    share = pack(parts, torch.ones((), dtype=torch.float64), host, torch.ones(2, BINS, dtype=torch.float64))
    sums = unpack(each.comm.sum(share), has_work=True)
    assert sums.work is not None
    report = rank_report(sums.work, 1.0, each.rank, each.comm.smallest)
    record = StepRecord(step=1, images_seen=IMAGES, loss=sums.parts[0], logged=True, **report)
    observers: list[Any] = [RankLog(run_dir, each.comm.info)]
    if each.comm.is_first:
        observers.append(MetricsFile(run_dir))
    for observer in observers:
        observer.on_step(Clock(IMAGES, 1), record)
        observer.close()


def _move_experts(each: Driven) -> None:
    """Move the experts of a group to other ranks, in an order that is turned by one expert."""
    world = each.comm.world
    groups = ExpertGroups(world, min(EXPERT_RANKS, world))
    before = np.tile(np.arange(EXPERTS).reshape(groups.size, -1), (BLOCKS, 1, 1))
    after = np.sort((before + 1) % EXPERTS, axis=2)
    state = VirtualExperts(each.rank, groups, before, is_sharded=True)
    migrate(each.comm, state, lambda: setattr(state, "experts", after))


def _share_grid(each: Driven) -> None:
    """Send the images of a sample grid to rank 0."""
    each.comm.interleave_on_first(torch.zeros(-(-GRID_IMAGES // each.comm.world), ELEMENTS), GRID_IMAGES)


class VirtualNodes(Nodes):
    """The nodes of the simulation. The group of the simulation cannot gather different host names."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.own = comm, comm.rank // RANKS_PER_NODE
        self.of_rank = [rank // RANKS_PER_NODE for rank in range(comm.world)]
        first = self.own * RANKS_PER_NODE
        self.mates = list(range(first, min(first + RANKS_PER_NODE, comm.world)))


def _save(world: int, folder: CountedFolder, run_dir: Path) -> Iterator[Phase]:
    """Write the shards of all ranks, let the ranks agree, and commit on rank 0."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    with RunFolder(run_dir) as run:
        host: dict[int, float] = {}
        with recording_comm(0, world, min(RANKS_PER_NODE, world)) as (comm, group):
            for rank in range(world):
                comm.rank, folder.owner = rank, rank
                store = CheckpointStore(run_dir / "checkpoints", CheckpointConfig(), comm, run)
                started = time.thread_time()
                problem = store.write_shard(_snapshot(rank))
                assert problem is None, problem
                if rank == 0:
                    store.agree(problem, IMAGES)
                host[rank] = time.thread_time() - started
            comm.rank, folder.owner = 0, 0
            counts = folder.take()
            yield Phase.of("checkpoint, shards", world, RANKS_PER_NODE, 0.0, counts, host, group.take())
            started = time.process_time()  # its threads count
            problem = store.commit(_snapshot(0))
            assert problem is None, problem
            store.agree(problem, IMAGES)
            host = {0: time.process_time() - started}
        yield Phase.of("checkpoint, commit", world, RANKS_PER_NODE, 0.0, folder.take(), host, group.take())


def _place(each: Driven, run_dir: Path) -> None:
    """Find the place of a shard in the file of the node."""
    store = CheckpointStore(run_dir / "checkpoints", CheckpointConfig(files="node"), each.comm)
    assert store.place(_snapshot(each.rank)) is not None


def _fail(each: Driven, run_dir: Path) -> None:
    """Agree that a checkpoint has failed. In the simulation all ranks have the problem of this one."""
    store = CheckpointStore(run_dir / "checkpoints", CheckpointConfig(), each.comm)
    with suppress(CheckpointError):
        store.agree(Problem("no answer"), 2 * IMAGES)
        raise AssertionError("a failed checkpoint was committed")


def _snapshot(rank: int) -> Snapshot:
    """Return the state of a rank: its own range of one tensor, and a part of the expert weights of its node."""
    values = np.full(ELEMENTS, rank, dtype=np.float32)
    tensors = {f"weight/dense{rank}@0": values, f"weight/expert{rank}@0": values}
    facts: Mapping[str, Any] = {
        "clock": {"images_seen": IMAGES, "steps": 1}, "config": Config().model_dump(mode="json"),
    }  # fmt: skip
    return Snapshot(IMAGES, tensors, {name.partition("@")[0]: (ELEMENTS,) for name in tensors}, facts)


def _restore(each: Driven, run_dir: Path, written_by: int) -> None:
    """Find and verify the checkpoint, and read what this rank needs: the tensors of `written_by / world` ranks."""
    with RunFolder(run_dir) as run:
        found = CheckpointStore(run_dir / "checkpoints", CheckpointConfig(resume="must"), each.comm, run).find()
        assert found is not None
        share = written_by // each.comm.world
        with ShardSet(found.folder, found.manifest) as shards:
            for source in range(each.rank * share, (each.rank + 1) * share):
                for kind in ("dense", "expert"):
                    shards.read_into(f"weight/{kind}{source}", 0, torch.empty(ELEMENTS))
