"""Files of ranks and of nodes on real ranks: exact on any layout, and a rank opens the files that it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdit.checkpoint.files import read_manifest
from tests.distributed.harness import case, fork_ranks
from tests.distributed.test_round_trip import TINY, WORKER, state_of

FIXTURE = Path(__file__).parents[1] / "data" / "checkpoint_format_1" / "images-000000000016"
SMALL = ("model.width=16", "model.depth=1", "model.heads=2", "train.steps=2", "train.global_batch=8")


def task(folder: Path, name: str, sources: list[Path], stage: int, *overrides: str) -> dict:
    """One layout that loads each source and saves it again in `folder / name`."""
    resume = f"checkpoint.resume={sources[0]}"
    return {
        "case": case(folder / f"run-{name}", TINY, *SMALL, resume, *overrides, stage=stage),
        "sources": [str(source) for source in sources],
        "out": str(folder / name),
    }


def written(folder: Path, name: str, number: int = 0) -> Path:
    return folder / name / str(number) / FIXTURE.name


def run_tasks(world: int, tasks: list[dict], folder: Path) -> None:
    listing = folder / f"tasks-{world}.json"
    listing.write_text(json.dumps(tasks))
    for result in fork_ranks(world, WORKER, [listing]):
        assert result.returncode == 0, result.stdout[-3000:]


def opens_of(folder: Path, name: str, world: int) -> list[list[int]]:
    """Opens to verify and to load, of each rank."""
    return [json.loads((folder / name / "0" / f"opens-{rank}.json").read_text()) for rank in range(world)]


def assert_equal(checkpoint: Path, want: dict[str, torch.Tensor]) -> None:
    got = state_of(checkpoint)
    assert got.keys() == want.keys()
    changed = [name for name in want if not torch.equal(bits(got[name]), bits(want[name]))]
    assert changed == []


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1).view(torch.int32)


def two_rank_tasks(folder: Path) -> list[dict]:
    node, expert = "checkpoint.files=node", "parallel.expert=2"
    return [
        task(folder, "rank", [FIXTURE], 1, expert),
        task(folder, "node", [written(folder, "rank")], 1, expert, node),
        task(folder, "from_node", [written(folder, "node")], 1, expert),
        task(folder, "replicas", [written(folder, "node")], 0, node),
        task(folder, "from_replicas", [written(folder, "replicas")], 0),
        task(folder, "last", [written(folder, "from_replicas")], 0),
    ]


def test_two_ranks_save_in_both_kinds_of_files_and_open_what_they_need(tmp_path: Path) -> None:
    """ZeRO 1 with EP 2, and ZeRO 0, where all ranks keep all state: one open to verify and one to load."""
    run_tasks(2, two_rank_tasks(tmp_path), tmp_path)
    want = state_of(FIXTURE)
    for name in ("rank", "node", "from_node", "replicas", "from_replicas", "last"):
        assert_equal(written(tmp_path, name), want)
    formats = {name: read_manifest(written(tmp_path, name))["format"] for name in ("rank", "node", "last")}
    assert formats == {"rank": 1, "node": 2, "last": 1}
    assert [path.name for path in written(tmp_path, "node").glob("*.shards")] == ["node-00000.shards"]
    for name in ("node", "from_node", "from_replicas", "last"):
        assert opens_of(tmp_path, name, 2) == [[1, 1], [1, 1]], name


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_other_layouts_read_node_files(tmp_path: Path, world: int) -> None:
    run_tasks(2, two_rank_tasks(tmp_path), tmp_path)
    sources = [written(tmp_path, name) for name in ("node", "replicas")]
    run_tasks(world, [task(tmp_path, "other", sources, 1, "checkpoint.files=node")], tmp_path)
    for number in range(len(sources)):
        assert_equal(written(tmp_path, "other", number), state_of(FIXTURE))
