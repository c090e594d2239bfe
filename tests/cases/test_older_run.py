"""A run that commit f0c4db0 began continues under this code: its checkpoint and its losses are in tests/data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from sdit.observe.metrics_file import read_metrics
from tests.cases.commands import ROOT, fork

STORED = ROOT / "tests" / "data" / "run_f0c4db0"
WORDS = [  # as f0c4db0 ran it, with --run-dir
    "--config", str(ROOT / "tests" / "distributed" / "tiny.yaml"),
    "model.width=16", "model.depth=1", "model.heads=2", "train.steps=8", "train.global_batch=8", "checkpoint.every_steps=4",
    "checkpoint.keep_last=9", "observe.metrics_port=null", "supervise.enabled=false", "sample.every_images=null",
]  # fmt: skip


def tensors_sha256(checkpoint: Path) -> str:
    """Hash of the names and bytes of all weights, moments and averages."""
    found = hashlib.sha256()
    (shard,) = checkpoint.glob("*.safetensors")
    for name, values in sorted(load_file(shard).items()):
        found.update(name.encode() + values.tobytes())
    return found.hexdigest()


def test_a_killed_run_of_an_older_version_ends_as_it_would_have(tmp_path: Path) -> None:
    """The old version trained 8 steps. This one resumes its checkpoint of step 4, and takes the same four steps.

    Bits depend on the vector unit of the CPU and on the build of torch. With others, the losses of four steps agree to
    1e-5: float32 has 6e-8, and a step sums about a hundred terms.
    """
    run = tmp_path / "run"
    shutil.copytree(STORED, run)
    done = fork("train", *WORDS, "--run-dir", run)
    assert done.status == 0, done.err
    assert "resumed at 32 images (step 4)" in done.err
    expected = json.loads((STORED / "expected.json").read_text())
    records = read_metrics(run)
    assert [record["step"] for record in records] == [5, 6, 7, 8]
    is_same = (torch.backends.cpu.get_cpu_capability(), torch.__version__) == (
        expected["cpu_capability"],
        expected["torch"],
    )
    for record, old in zip(records, expected["steps"], strict=True):
        now = {key: record[key] for key in old}
        assert now == (old if is_same else pytest.approx(old, rel=1e-5))
    if is_same:
        assert tensors_sha256(run / "checkpoints" / "images-000000000064") == expected["tensors_sha256"]
