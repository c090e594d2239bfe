"""Compiled blocks train the same run, with spread experts as well."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.harness import case, metrics_of, train_together

TINY = Path(__file__).with_name("tiny.yaml")
DEEP = ("train.steps=6", "model.depth=12")  # more blocks than torch.compile compiles a function for
COMPILED = (*DEEP, "parallel.compile=true")
RUNS = {  # name -> ranks, and what sets it apart
    "alone": (1, ("parallel.expert=1",)),
    "spread": (2, ("parallel.expert=2", "parallel.exchange=tokens")),
    "at-hand": (2, ("parallel.expert=2", "parallel.exchange=weights")),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_compiled_blocks_make_the_same_run(tmp_path: Path, kind: str) -> None:
    experts = f"model.experts.kind={kind}"
    plain = case(tmp_path / "plain", TINY, *DEEP, experts)
    runs = {name: case(tmp_path / name, TINY, *COMPILED, experts, *more) for name, (_, more) in RUNS.items()}
    train_together(1, [plain, runs["alone"]], tmp_path)
    train_together(2, [runs["spread"], runs["at-hand"]], tmp_path)
    for name in RUNS:
        for key in ("loss", "grad_norm"):
            want = [record[key] for record in metrics_of(tmp_path / "plain")]
            # Fused kernels sum in another order: float32 rounding, as between layouts.
            assert [record[key] for record in metrics_of(tmp_path / name)] == pytest.approx(want, rel=1e-5), (name, key)
