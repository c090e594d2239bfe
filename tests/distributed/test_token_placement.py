"""The law of re-placement: token-routed experts that change their ranks during a run do not change its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import case, tensors_of, train_together
from tests.distributed.test_expert_parallel import checkpoint_of
from tests.distributed.test_token_experts import COMMON, DIT, TINY, Layout, assert_same_run, moe

EVERY_IMAGES = 128  # 4 steps. The checks are before steps 5, 9, 13 and 17
MOVES = ("parallel.placement=balanced", f"parallel.placement_refresh_images={EVERY_IMAGES}")
SMALL = {"hidden_ratio": 0.25}  # experts whose move costs few bytes
RUNS = {
    "aux": (DIT, moe(shared=1, balance="aux", aux_weight=0.1, **SMALL)),
    "bias": (DIT, moe(score="sigmoid", renormalize="true", balance="bias", bias_rate=0.001, **SMALL)),
    "switch": (moe(kind="mlp", capacity_factor=1.5, **SMALL), "model.experts.count=8", "prior.weight=0"),
}
LAYOUTS = [
    Layout("aux", 2, 2, 0),
    Layout("switch", 2, 2, 1, "block"),
    Layout("aux", 4, 4, 1),
    Layout("bias", 4, 2, 2, "block"),
]
RESUMED = LAYOUTS[3]


def run_of(folder: Path, layout: Layout, *more: str) -> dict:
    settings = (f"parallel.expert={layout.experts}", f"parallel.activation_checkpointing={layout.checkpointing}")
    return case(folder / layout.name, TINY, *COMMON, *RUNS[layout.like], *settings, *MOVES, *more, stage=layout.stage)


def moves_of(run_dir: Path) -> dict[int, int]:
    """The token-routed experts that moved before each step, by step."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    texts = {event["step"]: event["text"] for event in events if event["text"].startswith("token-routed experts")}
    return {step + 1: int(text.split()[-3]) for step, text in texts.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of LAYOUTS by name, and those of one process, in which nothing can move."""
    folder = tmp_path_factory.mktemp("token-placement")
    train_together(1, [case(folder / name, TINY, *COMMON, *RUNS[name]) for name in RUNS], folder)
    for ranks in (2, 4):
        train_together(ranks, [run_of(folder, each) for each in LAYOUTS if each.ranks == ranks], folder)
    return folder


@pytest.fixture(scope="module")
def continued(runs: Path) -> Path:
    """`again` continues RESUMED from step 10 at its layout, `resharded` at another."""
    half_way = f"checkpoint.resume={checkpoint_of(runs / RESUMED.name, 10)}"
    layouts = {"again": RESUMED, "resharded": RESUMED._replace(experts=4, stage=1)}
    train_together(
        4, [{**run_of(runs, each, half_way), "run_dir": str(runs / name)} for name, each in layouts.items()], runs
    )
    return runs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: each.name)
def test_moved_experts_do_not_change_a_run(runs: Path, layout: Layout) -> None:
    assert sum(moves_of(runs / layout.name).values()) > 0
    assert_same_run(runs / layout.name, runs / layout.like)


def test_resume_is_exact_across_moves(continued: Path) -> None:
    """Checkpoints store the ranks of the experts and their counted choices, so that the same experts move again."""
    whole, again = moves_of(continued / RESUMED.name), moves_of(continued / "again")
    assert again == {step: moved for step, moved in whole.items() if step > 10} and again and min(whole) < 11
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        want, got = tensors_of(continued / RESUMED.name, kind), tensors_of(continued / "again", kind)
        assert want.keys() == got.keys()
        assert [name for name in want if not torch.equal(want[name], got[name])] == [], kind


def test_another_layout_places_experts_by_the_stored_choices_at_once(continued: Path) -> None:
    assert min(moves_of(continued / "resharded")) == 11
    assert_same_run(continued / "resharded", continued / RESUMED.like, first_step=11)
