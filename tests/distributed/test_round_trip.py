"""Save and load over the full matrix of layouts: every tensor of the state survives bit for bit, by global expert id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from sdit.checkpoint.find import find_checkpoint
from sdit.checkpoint.shard_set import ShardSet
from tests.distributed.harness import case, fork_ranks, train_together
from tests.stored_tensors import stored_tensor

TINY = Path(__file__).with_name("tiny.yaml")
WORKER = Path(__file__).with_name("round_trip.py")
# Learned loss weights are state as well; one big placement interval, so that nothing moves by itself.
SETTINGS = ("train.steps=3", "diffusion.weighting=uw", "model.experts.kind=mlp")
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


class Layout(NamedTuple):
    world: int
    experts: int
    stage: int
    precision: str
    placement: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def case(self, folder: Path, source: Path) -> dict:
        keys = (f"parallel.expert={self.experts}", f"parallel.placement={self.placement}", "train.global_batch=32")
        resume = (f"train.precision={self.precision}", f"checkpoint.resume={source}")
        return case(folder / self.name, TINY, *SETTINGS, *keys, *resume, stage=self.stage)


LAYOUTS = [
    Layout(world, experts, stage, precision, "path" if experts > 1 and stage == 1 else "index")
    for world in (1, 2, 4)
    for experts in (1, 2, 4)
    for stage in (0, 1, 2)
    for precision in ("fp32", "bf16")
    if world % experts == 0 and (precision == "fp32" or experts == min(world, 2))
]


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = find_checkpoint(checkpoint)
    with ShardSet(found.folder, found.manifest) as shards:
        names = [(kind, name) for kind in KINDS for name in shards.names(kind)]
        return {f"{kind}/{name}": stored_tensor(shards, f"{kind}/{name}") for kind, name in names}


def trip(folder: Path, sources: list[Path]) -> dict[Layout, list[Path]]:
    """Every layout loads each source and saves it again: the new checkpoints, in the order of the sources."""
    start = str(sources[0])
    for world in (1, 2, 4):
        tasks = [
            {"case": layout.case(folder, Path(start)), "sources": [str(path) for path in sources]}
            | {"out": str(folder / "out" / layout.name)}
            for layout in LAYOUTS
            if layout.world == world
        ]
        listing = folder / f"tasks-{world}.json"
        listing.write_text(json.dumps(tasks))
        for result in fork_ranks(world, WORKER, [listing], timeout_seconds=900):
            assert result.returncode == 0, result.stdout[-3000:]
    return {
        layout: [next((folder / "out" / layout.name / str(n)).glob("images-*")) for n in range(len(sources))]
        for layout in LAYOUTS
    }


@pytest.mark.slow
def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path) -> None:
    """27 layouts x 27 layouts, with all state spoilt before each load."""
    assert len(LAYOUTS) == 27
    train_together(1, [case(tmp_path / "first", TINY, *SETTINGS, stage=1)], tmp_path)
    first = find_checkpoint(tmp_path / "first").folder
    want = state_of(first)
    assert any("#3" in name for name in want) and any("objective" in name for name in want)
    assert all(values.any() for name, values in want.items() if name.startswith("exp_avg/objective"))

    (tmp_path / "once").mkdir()
    written = {layout: paths[0] for layout, paths in trip(tmp_path / "once", [first]).items()}
    (tmp_path / "twice").mkdir()
    for layout, checkpoints in trip(tmp_path / "twice", list(written.values())).items():
        for source, checkpoint in zip(written, checkpoints, strict=True):
            got = state_of(checkpoint)
            assert got.keys() == want.keys(), (source, layout)
            wrong = [name for name in want if not torch.equal(got[name], want[name])]
            assert wrong == [], (source, layout)
