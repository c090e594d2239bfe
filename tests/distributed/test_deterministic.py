"""`train.deterministic`: on CPUs it changes no number."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed.harness import case, numbers_of, tensors_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
STEPS = 3


def test_cpu_run_has_the_same_bits_with_and_without_the_switch(tmp_path: Path) -> None:
    """Experts are sharded, so that tokens travel and are added to their samples. No operation lacks an algorithm."""
    settings = (f"train.steps={STEPS}", "parallel.expert=2", "parallel.exchange=tokens")
    runs = {value: tmp_path / value for value in ("true", "false")}
    cases = [case(run_dir, TINY, *settings, f"train.deterministic={value}") for value, run_dir in runs.items()]
    train_together(2, cases, tmp_path)
    first, second = (numbers_of(run_dir) for run_dir in runs.values())
    assert len(first) == STEPS and first == second
    for kind in ("weight", "ema"):
        before, after = (tensors_of(run_dir, kind) for run_dir in runs.values())
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
