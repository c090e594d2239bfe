"""`train.deterministic`: on CPUs it changes no number."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sdit.errors import ExitCode
from tests.distributed.harness import numbers_of, tensors_of
from tests.faults.ranks import LAUNCHER, Ranks

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"


def test_cpu_run_has_the_same_bits_with_and_without_the_switch(tmp_path: Path) -> None:
    """Experts are sharded, so that tokens travel and are added to their samples. No operation lacks an algorithm."""
    runs = {value: tmp_path / value for value in ("true", "false")}
    settings = ["train.steps=3", "parallel.expert=2", "parallel.exchange=tokens", "supervise.enabled=false"]
    for value, run_dir in runs.items():
        command = [sys.executable, str(LAUNCHER), "--config", str(TINY), "--run-dir", str(run_dir), *settings]
        with Ranks(2, [*command, f"train.deterministic={value}"], run_dir.with_suffix(".log")) as ranks:
            assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    first, second = (numbers_of(run_dir) for run_dir in runs.values())
    assert len(first) == 3 and first == second
    for kind in ("weight", "ema"):
        before, after = (tensors_of(run_dir, kind) for run_dir in runs.values())
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
