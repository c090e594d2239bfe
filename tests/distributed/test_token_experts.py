"""The law of expert parallelism for token-routed experts: ranks, EP, ZeRO stage and recomputation do not change a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sdit.observe.token_maps import FIELDS, read_token_maps, token_map_files
from tests.distributed.harness import case, metrics_of, tensors_of, train_together
from tests.distributed.test_expert_parallel import assert_same_state, checkpoint_of

TINY = Path(__file__).with_name("tiny.yaml")
CURVES = ("loss", "mse", "grad_norm")
BATCH, STEPS, MAPPED_IMAGES = 32, 20, 128  # a map of token-routed experts in every 4th step
# AdamW makes full-size steps of gradients near zero, rounding included; an epsilon above the gradients keeps it smooth.
COMMON = (
    f"train.steps={STEPS}", "optimizer.epsilon=1e-2", "optimizer.learning_rate=1e-2", "checkpoint.every_steps=10",
    "checkpoint.keep_last=9", "model.patch_size=2", f"observe.routing_every_images={MAPPED_IMAGES}",
)  # fmt: skip
DIT = "model.variant=dit"


def moe(**keys: object) -> str:
    return (
        "model.moe={" + ", ".join(f"{key}: {value}" for key, value in {"experts": 8, "top_k": 2, **keys}.items()) + "}"
    )


RUNS = {  # name -> what sets the run's numbers; each is one process's run and the law for its layouts
    "aux": (DIT, moe(shared=2, shared_ratio=1, balance="aux", aux_weight=0.1)),
    "bias": (DIT, moe(shared=1, score="sigmoid", renormalize="true", scale=2, balance="bias", bias_rate=0.01)),
    "choice": (DIT, moe(router="expert_choice", kind="mlp", capacity_factor=2)),
    "capacity": (DIT, moe(kind="mlp", capacity_factor=1.25, balance="aux", aux_scope="sample")),
    "switch": (moe(experts=4, kind="mlp", every=2), "prior.weight=0"),
}


class Layout(NamedTuple):
    """How `ranks` share a run. `checkpointing` is `parallel.activation_checkpointing`."""

    like: str
    ranks: int
    experts: int
    stage: int
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    def case(self, folder: Path, *more: str) -> dict:
        settings = (f"parallel.expert={self.experts}", f"parallel.activation_checkpointing={self.checkpointing}")
        return case(folder / self.name, TINY, *COMMON, *RUNS[self.like], *settings, *more, stage=self.stage)


CASES = [Layout("aux", 4, 4, 1), Layout("bias", 4, 2, 2, "block")]
MATRIX = [
    Layout(like, ranks, experts, stage, checkpointing)
    for like, ranks, stage, checkpointing in product(RUNS, (1, 2, 4), (0, 1, 2), ("none", "block"))
    for experts in (1, 2, 4)
    if experts <= ranks
]
RESUMED = CASES[1]  # its biases are state, too


def resumed(folder: Path, name: str, layout: Layout) -> dict:
    """A run that continues from step 10 of RESUMED."""
    half_way = f"checkpoint.resume={checkpoint_of(folder / RESUMED.name, 10)}"
    return {**layout.case(folder, half_way), "run_dir": str(folder / name)}


def train_alone(folder: Path, names: Iterable[str]) -> None:
    train_together(1, [case(folder / name, TINY, *COMMON, *RUNS[name]) for name in names], folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of CASES by name, and those of one process."""
    folder = tmp_path_factory.mktemp("token-experts")
    train_alone(folder, [layout.like for layout in CASES])
    train_together(4, [layout.case(folder) for layout in CASES], folder)
    return folder


@pytest.fixture(scope="module")
def continued(runs: Path) -> Path:
    """`again` continues RESUMED at its layout, `resharded` at another."""
    again, other = resumed(runs, "again", RESUMED), resumed(runs, "resharded", RESUMED._replace(experts=4, stage=1))
    train_together(4, [again, other], runs)
    return runs


@pytest.fixture(scope="module")
def matrix(runs: Path) -> Path:
    train_alone(runs, [name for name in RUNS if not (runs / name).exists()])
    for name, ranks in product(RUNS, (1, 2, 4)):
        layouts = [each for each in MATRIX if (each.like, each.ranks) == (name, ranks) and each not in CASES]
        train_together(ranks, [each.case(runs) for each in layouts], runs, limit_seconds=900)
    return runs


def assert_same_run(actual: Path, expected: Path, first_step: int = 1) -> None:
    want, got = ({row["step"]: row for row in metrics_of(folder)} for folder in (expected, actual))
    assert sorted(got) == list(range(first_step, STEPS + 1)) and sorted(want) == list(range(1, STEPS + 1))
    for step, row in got.items():
        for key in CURVES:
            assert row[key] == pytest.approx(want[step][key], rel=1e-5), (key, step)
    assert_same_state(actual, expected, ("weight", "ema", "exp_avg", "exp_avg_sq"))
    mapped = range(MAPPED_IMAGES, BATCH * STEPS + 1, MAPPED_IMAGES)
    assert_same_maps(actual, expected, [images for images in mapped if images >= BATCH * first_step])


def assert_same_maps(actual: Path, expected: Path, images: Sequence[int]) -> None:
    """Both runs have maps of these steps with the same counts by global expert id. They are whole numbers."""
    wanted, found = (
        {each.images_seen: each for each in read_token_maps(token_map_files(folder / "routing"), pytest.fail)}
        for folder in (expected, actual)
    )
    assert sorted(found) == list(images) and set(images) <= set(wanted)
    for seen, got in found.items():
        for name in FIELDS:
            assert np.array_equal(getattr(got, name), getattr(wanted[seen], name)), (name, seen)


@pytest.mark.parametrize("layout", CASES, ids=lambda each: each.name)
def test_a_run_does_not_depend_on_the_layout_of_token_routed_experts(runs: Path, layout: Layout) -> None:
    assert_same_run(runs / layout.name, runs / layout.like)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MATRIX, ids=lambda each: each.name)
def test_no_layout_changes_a_run(matrix: Path, layout: Layout) -> None:
    assert_same_run(matrix / layout.name, matrix / layout.like)


def test_training_moves_every_expert(runs: Path) -> None:
    """Without this the comparison of weights could compare initial ones."""
    moments = tensors_of(runs / "aux", "exp_avg_sq")
    experts = [name for name in moments if ".moe.experts." in name]
    assert len(experts) == 2 * 8 * 3 and all(moments[name].any() for name in experts)


@pytest.mark.slow
def test_resume_is_exact_at_the_same_layout(continued: Path) -> None:
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        want, got = tensors_of(continued / RESUMED.name, kind), tensors_of(continued / "again", kind)
        assert want.keys() == got.keys()
        assert [name for name in want if not torch.equal(want[name], got[name])] == [], kind


@pytest.mark.slow
def test_a_checkpoint_continues_at_another_layout(continued: Path) -> None:
    assert_same_run(continued / "resharded", continued / RESUMED.like, first_step=11)
