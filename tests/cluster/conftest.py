"""What several launchers' tests share: the run of the `deepspeed` launcher that all are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.runs import ARGUMENTS, RANKS, free_ports, launch
from tests.distributed.harness import ROOT


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: `runs.ARGUMENTS` trained on four ranks of one node by the `deepspeed` launcher."""
    run_dir = tmp_path_factory.mktemp("deepspeed") / "run"
    launcher = ("deepspeed", "--num_gpus", str(RANKS), "--master_port", str(*free_ports(1)))
    launch(*launcher, str(ROOT / "launcher" / "train.py"), "--run-dir", str(run_dir), *ARGUMENTS)
    return run_dir
