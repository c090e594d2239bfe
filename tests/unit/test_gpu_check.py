"""The GPU check runs its own code on a CPU, so that no GPU minute goes into a typing error."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "benchmarks" / "gpu_check.py"


def run_check(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), "--out", str(out), "--device", "cpu", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_all_stages_pass_on_a_cpu(tmp_path: Path) -> None:
    result = run_check(tmp_path, "--tiny")
    table = (tmp_path / "table.md").read_text()
    assert result.returncode == 0, result.stdout + "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    stages = {path.stem for path in (ROOT / "benchmarks" / "gpu").glob("stage_*.py")}
    assert {path.stem for path in tmp_path.glob("*.json")} == {stage.removeprefix("stage_") for stage in stages}
    assert "**no**" not in table
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["rows"], path


@pytest.mark.parametrize(
    ("code", "minutes", "expected"),
    [("import time; time.sleep(600)", "0.05", "ended after"), ("raise SystemExit(3)", "8", "exit status 3")],
)
def test_a_stage_that_hangs_or_fails_is_in_the_table(tmp_path: Path, code: str, minutes: str, expected: str) -> None:
    (tmp_path / "torch.py").write_text(code)  # found before the installed one
    result = run_check(tmp_path / "out", "--stages", "numerics", "--minutes", minutes, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert f"| numerics | the stage | {expected}" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("is_good", "problem", "expected"), [(True, "", True), (None, "", True), (False, "", False), (True, "x", False)]
)
def test_a_missed_limit_fails_the_check(
    is_good: bool | None, problem: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CHECK.parent))
    gpu_check = importlib.import_module("gpu_check")
    row = {"name": "loss", "value": 0.5, "unit": "", "wanted": "at most 0.1", "is_good": is_good}
    result = gpu_check.Result("numerics", [row], 1.0, problem)
    assert gpu_check.is_good(result) is expected
    assert ("**no**" in gpu_check.as_table([result])) is not expected
