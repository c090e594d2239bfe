#!/usr/bin/env python3
"""What rank 0 does to commit a checkpoint of W ranks, and what a rank does to find its ranges in it.

usage: python benchmarks/checkpoint_scale.py [--ranks 8 64 512 4096] [--experts 16]

One process writes the reports of W ranks, 8 per node (XL/2, ZeRO 1: each rank has a range of the flattened weights, of the EMA
and of two moments), and W small files in place of their shards. Measured are the real functions of rank 0:
`CheckpointStore.commit`, which reads and removes the reports and an older checkpoint of W files, and of a reader:
`read_manifest` and `index_of`. Times are by the wall and, in parentheses, of the process on a CPU, which other load on the
machine does not change.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdit.checkpoint.files import MANIFEST, ShardRecord, read_manifest
from sdit.checkpoint.load import logical_tensors
from sdit.checkpoint.shard_reports import append_report
from sdit.checkpoint.shard_set import index_of
from sdit.checkpoint.store import CheckpointStore, Snapshot
from sdit.config import CheckpointConfig, load_config
from sdit.distributed.comm import Comm
from sdit.launch_environment import RankInfo
from sdit.model import build_model

KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
XL = ["model.depth=28", "model.width=1152", "model.heads=16", "model.patch_size=2", "model.input_size=32"]
HEADER_BYTES = 4096
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Cost:
    """Seconds by the wall, and of this process on a CPU."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{1000 * self.wall:.0f} ms ({1000 * self.cpu:.0f} ms)"


@dataclass(frozen=True)
class CommitCost:
    """Costs of rank 0 and of a reader, and sizes, for a checkpoint of `ranks` shard files."""

    ranks: int
    ranges: int
    reports_bytes: int
    manifest_bytes: int
    commit: Cost
    read_manifest: Cost
    read_index: Cost


class FirstRank:
    """Rank 0 of nodes of 8 ranks, of which only the hosts are gathered."""

    rank, is_first = 0, True

    def __init__(self, world: int) -> None:
        self.world, self.info = world, RankInfo(0, world, 0, RANKS_PER_NODE, "simulation")

    def gather(self, _: object) -> list[Any]:
        """Return host and local rank of each rank."""
        return [[f"node-{rank // RANKS_PER_NODE}", rank % RANKS_PER_NODE] for rank in range(self.world)]


def simulate_commit(folder: Path, ranks: int, experts: int = 16) -> CommitCost:
    """Commit three checkpoints of `ranks` files in an empty folder and return the costs of the last one.

    It removes the first one, because two are kept.
    """
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2), cast(Comm, FirstRank(ranks)))
    shards = list(_shards(ranks, experts))
    facts = {"config": {}, "written_by": {"ranks": ranks}}
    for images in (1, 2, 3):
        temporary = folder / f".images-{images:012d}.tmp"
        temporary.mkdir(parents=True)
        for rank, shard in enumerate(shards):
            (temporary / f"shard-{rank:05d}.safetensors").touch()
            append_report(temporary, rank // RANKS_PER_NODE, rank, shard)
        sent = sum(path.stat().st_size for path in temporary.glob("reports-*"))
        clock = {"clock": {"images_seen": images, "steps": 1}}
        problem, commit = _timed(lambda: store.commit(Snapshot(images, {}, {}, facts | clock)))  # noqa: B023
        assert problem is None, problem
    newest = store.folder_of(3)
    manifest, read = _timed(lambda: read_manifest(newest))
    _, index = _timed(lambda: index_of(newest, manifest))
    size = (newest / MANIFEST).stat().st_size
    return CommitCost(ranks, manifest["index"]["count"], sent, size, commit, read, index)


def _timed(action: Callable[[], Any]) -> tuple[Any, Cost]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _shards(ranks: int, experts: int) -> Iterator[dict[str, Any]]:
    """Yield what `CheckpointStore.listed` returns on each rank, with the name and shape of each tensor of the model."""
    config = load_config(None, [*XL, f"model.experts.count={experts}", "data.source=digits"])
    tensors = [
        (name, tuple(view.shape), view.numel())
        for name, view in logical_tensors(build_model(config.model, device="meta"))
    ]
    numel = -(-sum(size for _, _, size in tensors) // ranks)
    first, position = 0, 0  # the next tensor, and its next element
    for rank in range(ranks):
        pieces, left = [], numel
        while left and first < len(tensors):
            name, shape, size = tensors[first]
            count = min(left, size - position)
            pieces.append((name, shape, position, count))
            left, position = left - count, position + count
            if position == size:
                first, position = first + 1, 0
        yield _shard(rank, pieces)


@cache
def _tensors(experts: int) -> list[tuple[str, tuple[int, ...], int]]:
    """Return name, shape and elements of each tensor of the model."""
    config = load_config(None, [*XL, f"model.experts.count={experts}", "data.source=digits"])
    model = build_model(config.model, device="meta")
    return [(name, tuple(view.shape), view.numel()) for name, view in logical_tensors(model)]


def _shard(rank: int, pieces: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, Any]:
    ranges, shapes, offset = {}, {}, HEADER_BYTES
    for kind in KINDS:
        for name, shape, start, count in pieces:
            ranges[f"{kind}/{name}@{start}"] = (offset, count)
            shapes[f"{kind}/{name}"] = shape
            offset += 4 * count
    record = ShardRecord(f"shard-{rank:05d}.safetensors", offset, f"{rank:032x}", 0, offset)
    return {"record": asdict(record), "ranges": ranges, "shapes": shapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096], help="numbers of ranks")
    parser.add_argument("--experts", type=int, default=16, help="experts of a block")
    options = parser.parse_args()
    print("| ranks | ranges | reports | manifest | rank 0: commit | reader: manifest | reader: index |")
    print("|---|---|---|---|---|---|---|")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            cost = simulate_commit(Path(folder), ranks, options.experts)
        times = " | ".join(map(str, (cost.commit, cost.read_manifest, cost.read_index)))
        print(
            f"| {ranks} | {cost.ranges} | {cost.reports_bytes / 1e3:.0f} KB | {cost.manifest_bytes / 1e3:.0f} KB | {times} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
