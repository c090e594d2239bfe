"""The GPU check runs its own code on a CPU, so that no GPU minute goes into a typing error."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.forks import run_script

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "benchmarks" / "gpu_check.py"
STAGES = sorted(path.stem.removeprefix("stage_") for path in (ROOT / "benchmarks" / "gpu").glob("stage_*.py"))


def run_check(out: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), "--out", str(out), "--device", "cpu", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def assert_passes(folder: Path, *words: str) -> None:
    """Run the check at its smallest sizes. Each stage that `folder` names ends well, reports rows, and misses no limit."""
    result = run_check(folder, "--tiny", *words)
    assert result.returncode == 0, result.stdout + "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    assert "**no**" not in (folder / "table.md").read_text()
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["rows"], path


def test_the_check_runs_its_stages_on_a_cpu(tmp_path: Path) -> None:
    """Two stages. `test_each_stage_passes_on_a_cpu` runs the code of all of them without the time of their imports."""
    assert_passes(tmp_path, "--stages", "machine", "kernels")
    assert {path.stem for path in tmp_path.glob("*.json")} == {"machine", "kernels"}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_passes_on_a_cpu(tmp_path: Path, stage: str) -> None:
    out = tmp_path / "rows.json"
    words = (stage, "--device", "cpu", "--tiny", "--out", out)
    status, log = run_script(CHECK.with_name("gpu"), words, {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "log")
    assert status == 0, log
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["is_good"] is not False for row in rows), rows


@pytest.mark.slow
def test_all_stages_pass_on_a_cpu_as_the_check_starts_them(tmp_path: Path) -> None:
    assert_passes(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == STAGES


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
