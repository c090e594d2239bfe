"""The held-out loss: one number per weights, whatever the layout, and the one that a plain loop computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdit.checkpoint.load import load_model
from sdit.data.digits import digits
from sdit.data.encoders import png_encoder
from sdit.data.prepare import prepare
from sdit.data.sources import digits_source
from sdit.diffusion import build_objective
from sdit.randomness import Purpose, normal_noise
from sdit.time_law import TimeLaw
from sdit.train.validation import SEED_OFFSET
from tests.distributed.harness import case, metrics_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
STEPS, BATCH, IMAGES = 12, 32, 50  # 50 images are rounded up to 64
KEYS = ("validation_loss", "validation_mse", "validation_loss_by_timestep")
CAPPED = ("model.experts.capacity_factor_eval=1.0",)
LAYOUTS = {  # name -> ranks, overrides, ZeRO stage
    "one": (1, (), 0),
    "one-accumulated": (1, ("train.micro_batch=8",), 1),
    "two": (2, ("parallel.exchange=tokens",), 2),
    "two-spread": (2, ("parallel.expert=2", "parallel.exchange=tokens", "train.micro_batch=8"), 1),
    "four-spread": (4, ("parallel.expert=4",), 1),
    "four-capped": (4, ("parallel.expert=2", "parallel.exchange=tokens", *CAPPED), 1),
    "one-capped": (1, CAPPED, 0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    prepare(digits_source(), png_encoder(), folder / "held-out", 256, 1, False)
    settings = (
        f"train.steps={STEPS}", "validation.every_images=128", f"validation.path={folder / 'held-out'}",
        f"validation.images={IMAGES}",
        "optimizer.learning_rate=1e-2", "optimizer.epsilon=1e-3", "optimizer.warmup_images=0", "ema.decay=0.5",
    )  # fmt: skip
    for world in (1, 2, 4):
        cases = [
            case(folder / name, TINY, *settings, *keys, stage=stage)
            for name, (ranks, keys, stage) in LAYOUTS.items()
            if ranks == world
        ]
        if world == 1:
            cases.append(case(folder / "without", TINY, settings[0], *settings[4:], stage=0))
        train_together(world, cases, folder)
    return folder


def measured(run_dir: Path) -> list[dict]:
    return [{key: record[key] for key in KEYS} for record in metrics_of(run_dir) if "validation_loss" in record]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("one-c") and name != "one"])
def test_held_out_loss_does_not_depend_on_the_layout(runs: Path, name: str) -> None:
    want, got = measured(runs / ("one-capped" if "capped" in name else "one")), measured(runs / name)
    assert len(want) == len(got) == 3
    for expected, actual in zip(want, got, strict=True):
        assert actual["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
        assert actual["validation_mse"] == pytest.approx(expected["validation_mse"], rel=1e-5)
        assert actual["validation_loss_by_timestep"] == pytest.approx(expected["validation_loss_by_timestep"], rel=1e-4)


def test_measuring_it_leaves_no_trace_in_the_run(runs: Path) -> None:
    plain, watched = metrics_of(runs / "without"), metrics_of(runs / "one")
    assert [record["loss"] for record in plain] == [record["loss"] for record in watched]


def test_eval_capacity_drops_samples_of_the_held_out_loss_alone(runs: Path) -> None:
    capped, free = metrics_of(runs / "one-capped"), metrics_of(runs / "one")
    assert [record["loss"] for record in capped] == pytest.approx([record["loss"] for record in free], rel=1e-5)
    assert measured(runs / "one-capped")[-1]["validation_loss"] != measured(runs / "one")[-1]["validation_loss"]
    assert all(record["dropped_fraction"] == 0 for record in capped)


def test_it_is_what_a_plain_loop_computes_from_the_averaged_weights(runs: Path) -> None:
    trained = load_model(runs / "one", "ema")
    objective = build_objective(trained.config.diffusion, trained.config.model.timesteps)
    pictures, labels = digits()
    losses = []
    for first in range(0, 2 * BATCH, BATCH):
        index = np.arange(first, first + BATCH)
        order = held_out_order(runs / "held-out", trained.config.model, index)
        x0 = torch.from_numpy(pictures[order].astype(np.float32) / 127.5 - 1)
        t = torch.from_numpy(TimeLaw("stratified").draw(SEED_OFFSET, first, BATCH, 1000))
        noise = torch.from_numpy(normal_noise(SEED_OFFSET, index, tuple(x0.shape[1:]), Purpose.NOISE))
        with torch.no_grad():
            losses.append(objective(trained.model, x0, t, torch.from_numpy(labels[order]), noise).loss)
    assert measured(runs / "one")[-1]["validation_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def held_out_order(folder: Path, model: object, index: np.ndarray) -> np.ndarray:
    """Positions in the data set of the samples with these indices: their pictures are looked up among all."""
    from sdit.config import DataConfig
    from sdit.data.loader import build_loader

    pictures, _ = digits()
    with build_loader(DataConfig(source="shards", path=str(folder)), model, 0, 1) as loader:
        x0 = loader.read(index).x0
    pixels = np.rint((x0 + 1) * 127.5).astype(np.uint8)
    flat = pictures.reshape(len(pictures), -1)
    return np.array([int(np.flatnonzero((flat == image.reshape(-1)).all(axis=1))[0]) for image in pixels])
