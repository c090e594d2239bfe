"""What else a run with token-routed experts does: held-out loss, sample grids, a start from a dense model, bf16."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sdit.data.encoders import png_encoder
from sdit.data.prepare import prepare
from sdit.data.sources import digits_source
from tests.distributed.harness import case, metrics_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
DIT, SHARDED = "model.variant=dit", "parallel.expert=2"
BATCH, HELD_OUT = 32, 64
SMOOTH = ("optimizer.learning_rate=1e-2", "optimizer.epsilon=1e-3", "optimizer.warmup_images=0", "model.patch_size=2")
ROUTED = (
    DIT, "model.moe={experts: 4, shared: 1, capacity_factor: 1.25, balance: aux, aux_weight: 0.1}", "train.steps=8",
    "validation.every_images=128", "sample.every_images=128", "sample.guidance=2", "ema.decay=0.5", *SMOOTH,
)  # fmt: skip
# k copies of an MLP whose weights sum to 1 compute what the MLP computes.
UPCYCLED = "model.moe={experts: 4, kind: mlp, hidden_ratio: 4, renormalize: true, every: 1}"
LAYOUTS = {"one": (1, "parallel.expert=1", 0), "two-ep2": (2, SHARDED, 1), "two-ep2-recomputed": (2, SHARDED, 2)}


def held_out(folder: Path) -> tuple[str, ...]:
    if not (folder / "held-out").exists():
        prepare(digits_source(), png_encoder(), folder / "held-out", 256, 1, False)
    return f"validation.path={folder / 'held-out'}", f"validation.images={HELD_OUT}"


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run at each layout, with a held-out loss and a sample grid after 4 and 8 steps."""
    folder = tmp_path_factory.mktemp("routed")
    settings = (*ROUTED, *held_out(folder))
    recomputed = "parallel.activation_checkpointing=block"
    for world in (1, 2):
        train_together(
            world,
            [
                case(folder / name, TINY, *settings, expert, *([recomputed] * ("recomputed" in name)), stage=stage, grids=1)
                for name, (ranks, expert, stage) in LAYOUTS.items()
                if ranks == world
            ],
            folder,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["two-ep2", "two-ep2-recomputed"])
def test_held_out_loss_is_that_of_one_process(routed: Path, name: str) -> None:
    want, got = ([row for row in metrics_of(routed / each) if "validation_loss" in row] for each in ("one", name))
    assert [row["step"] for row in got] == [row["step"] for row in want] == [4, 8]
    for expected, actual in zip(want, got, strict=True):
        for key in ("validation_loss", "validation_mse"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-5), key
        assert actual["validation_loss_by_timestep"] == pytest.approx(expected["validation_loss_by_timestep"], rel=1e-4)
    assert all(row["token_dropped_fraction"] > 0 for row in metrics_of(routed / name))  # only training has the limit


@pytest.mark.parametrize("name", ["two-ep2", "two-ep2-recomputed"])
def test_sampled_images_are_those_of_one_process(routed: Path, name: str) -> None:
    """Weights differ by the rounding of sums, 1e-5 of their norm at most, and so do images, whose range is 2."""
    for images in (128, 256):
        want, got = (np.load(routed / each / f"grid-{images}.npy") for each in ("one", name))
        assert want.shape == got.shape and np.abs(got - want).max() <= 1e-4
        assert np.abs(np.diff(want, axis=0)).max() > 1e-2  # images differ by far more than that


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, and runs that start from it: `dense-again`, and token-routed ones on one rank and on two."""
    folder = tmp_path_factory.mktemp("upcycled")
    common = (DIT, *held_out(folder), "validation.every_images=100000", *SMOOTH)
    train_together(1, [case(folder / "dense", TINY, *common, "train.steps=12", stage=0)], folder)
    start = (*common, "train.steps=3", f"train.init_from={folder / 'dense'}")
    alone = [
        case(folder / "dense-again", TINY, *start, stage=0),
        case(folder / "upcycled-1", TINY, *start, UPCYCLED, stage=0),
    ]
    train_together(1, alone, folder)
    train_together(2, [case(folder / "upcycled-2", TINY, *start, UPCYCLED, SHARDED, stage=1)], folder)
    return folder


@pytest.mark.parametrize("name", ["upcycled-1", "upcycled-2"])
def test_an_upcycled_run_starts_with_the_losses_of_the_dense_model(started: Path, name: str) -> None:
    """Gates of copies sum to 1 up to float32 rounding, so the losses agree to 1e-6 before the first update."""
    events = [json.loads(line) for line in (started / name / "events.jsonl").read_text().splitlines()]
    (text,) = [event["text"] for event in events if event["event"] == "initial_validation"]
    assert float(text.split()[1]) == pytest.approx(metrics_of(started / "dense")[-1]["validation_loss"], rel=1e-6)
    dense, routed = metrics_of(started / "dense-again"), metrics_of(started / name)
    for key in ("loss", "mse", "vlb"):
        assert routed[0][key] == pytest.approx(dense[0][key], rel=1e-6), key
    assert routed[2]["loss"] != pytest.approx(dense[2]["loss"], rel=1e-6)  # the experts have learned on their own


def test_an_upcycled_run_does_not_depend_on_the_layout(started: Path) -> None:
    for want, got in zip(metrics_of(started / "upcycled-1"), metrics_of(started / "upcycled-2"), strict=True):
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


LONG = {
    "aux": "model.moe={experts: 8, shared: 1, balance: aux, capacity_factor: 1.25}",
    "bias": "model.moe={experts: 8, score: sigmoid, renormalize: true, scale: 2, balance: bias, bias_rate: 0.01}",
}


@pytest.mark.slow
def test_500_steps_in_bf16_are_finite(tmp_path: Path) -> None:
    settings = (
        DIT,
        SHARDED,
        "train.precision=bf16",
        "train.steps=500",
        "model.patch_size=2",
        "checkpoint.resume=never",
    )
    train_together(2, [case(tmp_path / name, TINY, *settings, moe, stage=1) for name, moe in LONG.items()], tmp_path)
    for name in LONG:
        rows = metrics_of(tmp_path / name)
        assert len(rows) == 500 and rows[-1]["skipped_steps"] == 0
        for key in ("loss", "grad_norm", "router_entropy", "aux_loss"):
            assert all(math.isfinite(row[key]) for row in rows), (name, key)
        first, last = (np.mean([row["mse"] for row in part]) for part in (rows[:20], rows[-20:]))
        assert last < 0.5 * first, name
