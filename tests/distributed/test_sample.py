"""The layout law of sampling: a checkpoint draws the same images on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdit.checkpoint.load import load_trained
from sdit.evaluate.generate import Generator
from tests.distributed.harness import ROOT, fork_ranks
from tests.unit.written_run import tiny_config, write_run

IMAGES = 7  # not a multiple of the ranks


def test_images_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny_config("sample.sampler=ddpm"))
    trained = load_trained(tmp_path / "run")
    labels = np.arange(IMAGES, dtype=np.int64) % 5
    alone = np.concatenate(list(Generator(trained, trained.config.sample).images(labels)))
    files = ["--raw", str(tmp_path / "two.npy"), "--npz", str(tmp_path / "two.npz"), "--out", str(tmp_path / "two.png")]
    words = ["--checkpoint", str(tmp_path / "run"), "--images", str(IMAGES), "--batch", "2", "--threads", "1", *files]
    for result in fork_ranks(2, ROOT / "launcher" / "sample.py", words):
        assert result.returncode == 0, result.stdout[-3000:]
    together = np.load(tmp_path / "two.npy")
    assert together.shape == alone.shape and np.abs(together - alone).max() <= 1e-5
    # Images differ by far more than that, so none is in another's place.
    assert np.abs(np.diff(alone, axis=0)).max(axis=(1, 2, 3)).min() > 1e-2
    with np.load(tmp_path / "two.npz") as stored:
        assert stored["arr_1"].tolist() == labels.tolist() and len(stored["arr_0"]) == IMAGES
    assert (tmp_path / "two.png").exists()
