"""A checkout runs its own code, also if another version is installed; an installed wheel is not a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdit import cli
from sdit.cli import checkout
from sdit.errors import ExitCode

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "distributed" / "tiny.yaml"


def test_the_ranks_of_a_checkout_import_its_code(tmp_path: Path) -> None:
    """As `sdit submit` needs it: its frozen work tree trains in an environment where another checkout is installed."""
    copy, witness = tmp_path / "checkout", tmp_path / "witness"
    for name in ("sdit", "launcher", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "sdit" / "__init__.py").open("a") as file:
        file.write(f"\nimport os, sys\nprint(os.getpid(), *sys.argv[1:3], file=open({str(witness)!r}, 'a'))\n")
    command = [sys.executable, str(copy / "launcher" / "train.py"), "--config", str(TINY), "train.steps=1"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")
    }
    done = subprocess.run(
        [*command, "--run-dir", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    starts = {line.split()[0] for line in witness.read_text().splitlines() if line.endswith(f" --config {TINY}")}
    assert len(starts) == 2  # the supervisor and its rank


def test_submit_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    assert cli.run(["submit", "--run-dir", "r", "--dry-run"]) == ExitCode.CONFIG
    assert "is not a checkout of the repository; legal: python launcher/submit.py" in capsys.readouterr().err
