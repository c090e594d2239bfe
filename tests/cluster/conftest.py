"""What several launchers' tests share: the run of the `deepspeed` launcher that all are held against."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ARGUMENTS, RANKS, RUN_SECONDS, commit_all, free_ports, launch
from tests.distributed.harness import ROOT


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: `runs.ARGUMENTS` trained on four ranks of one node by the `deepspeed` launcher."""
    run_dir = tmp_path_factory.mktemp("deepspeed") / "run"
    launcher = ("deepspeed", "--num_gpus", str(RANKS), "--master_port", str(*free_ports(1)))
    launch(*launcher, str(ROOT / "launcher" / "train.py"), "--run-dir", str(run_dir), *ARGUMENTS)
    return run_dir


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a clean copy."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    source = commit_all(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = folder.glob("*.whl")
    return found
