"""An evaluation gives the same images and scores on any number of ranks, and continues after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdit.checkpoint.load import load_trained
from sdit.evaluate.generate import Generator
from tests.distributed.harness import ROOT, fork_ranks, rank_environments
from tests.unit.written_run import tiny_config, write_run

pytestmark = pytest.mark.slow  # seconds of imports for every rank

EVALUATE = ROOT / "launcher" / "evaluate.py"
IMAGES = 50  # blocks of 16 do not divide it
DEADLINE_SECONDS = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on 8 x 8 pixels and room for the feature network."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_run(folder / "run", tiny_config("model.input_size=8", "model.classes=10", "sample.sampler=ddpm"))
    return folder


def drawing(place: Path, name: str, *more: object) -> Sequence[object]:
    words = ("--checkpoint", place / "run", "--images", IMAGES, "--batch", 3, "--threads", 1)
    return (*words, "--npz", place / f"{name}.npz", *more)


def evaluation(place: Path, name: str, *more: object) -> Sequence[object]:
    out = ("--out", place / f"{name}.json", "--reference", "digits", "--cache", place / "cache", "--block", 16)
    return drawing(place, name, *out, *more)


def evaluate(place: Path, world: int, name: str) -> tuple[dict[str, Any], np.ndarray]:
    """The result and the images of an evaluation on `world` ranks."""
    for result in fork_ranks(world, EVALUATE, evaluation(place, name)):
        assert result.returncode == 0, result.stdout[-3000:]
    assert not (place / f"{name}.parts").exists()
    with np.load(place / f"{name}.npz") as stored:
        return json.loads((place / f"{name}.json").read_text()), stored["arr_0"]


@pytest.fixture(scope="module")
def alone(place: Path) -> tuple[dict[str, Any], np.ndarray]:
    return evaluate(place, 1, "one")


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("world", [2, 4])
def test_images_and_scores_do_not_depend_on_the_ranks(
    place: Path, world: int, alone: tuple[dict[str, Any], np.ndarray]
) -> None:
    result, images = evaluate(place, world, f"ranks{world}")
    assert images.shape == (IMAGES, 8, 8, 1)
    # Floats differ by a rounding (the next test), so a pixel on the edge between two levels may take the other.
    assert np.abs(images.astype(int) - alone[1]).max() <= 1 and (images != alone[1]).mean() <= 1e-3
    assert np.abs(np.diff(images.astype(int), axis=0)).max(axis=(1, 2, 3)).min() > 5  # none is in another's place
    assert numbers(result) == pytest.approx(numbers(alone[0]), rel=1e-3)
    assert result["drawn"] == alone[0]["drawn"] and result["features"] == alone[0]["features"]


def test_floats_do_not_depend_on_the_ranks(place: Path) -> None:
    raw = place / "raw.npy"  # two ranks: test_sample.py
    for result in fork_ranks(4, ROOT / "launcher" / "sample.py", drawing(place, "raw", "--raw", raw)):
        assert result.returncode == 0, result.stdout[-3000:]
    trained = load_trained(place / "run")
    labels = np.arange(IMAGES, dtype=np.int64) % 10
    expected = np.concatenate(list(Generator(trained, trained.config.sample).images(labels)))
    assert np.abs(np.load(raw) - expected).max() <= 1e-5


def test_a_killed_evaluation_goes_on(place: Path, alone: tuple[dict[str, Any], np.ndarray]) -> None:
    parts = place / "killed.parts"
    words = [sys.executable, EVALUATE, *map(str, evaluation(place, "killed"))]
    with (place / "killed.log").open("w") as log:
        process = subprocess.Popen(words, env=rank_environments(1)[0], stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not list(parts.glob("*/images-*.npz")):
                assert process.poll() is None and time.monotonic() < deadline, (place / "killed.log").read_text()
                time.sleep(0.002)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (place / "killed.json").exists()
    first = next(parts.glob("*/images-000000000.npz"))
    with np.load(first) as stored:
        block = stored["arr_0"]
    block[0, 0, 0, 0] ^= 1  # a mark that drawing it again would not leave
    np.savez(first, arr_0=block)
    result, images = evaluate(place, 2, "killed")
    assert np.array_equal(images[:16], block)
    assert np.abs(images.astype(int) - alone[1]).max() <= 2 and (images != alone[1]).mean() <= 1e-3
    assert numbers(result) == pytest.approx(numbers(alone[0]), rel=1e-2)
