"""The same run under Open MPI's mpirun."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import ARGUMENTS, RANKS, assert_same_curve, launch

pytestmark = pytest.mark.cluster
# Root and more ranks than cores: what a test's machine needs and a cluster does not.
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n")


def test_mpirun_trains_what_deepspeed_trains(reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    output = launch(*MPIRUN, str(RANKS), sys.executable, "launcher/train.py", "--run-dir", str(run_dir), *ARGUMENTS)
    assert f"ranks: rank 0 of {RANKS}, 0 of {RANKS} on this node; found by Open MPI; rendezvous at 127.0.0.1:" in output
    assert json.loads((run_dir / "environment.json").read_text())["ranks_found_by"] == "Open MPI"
    assert_same_curve(run_dir, reference)


def test_mpi_itself_tells_the_rank_where_no_known_variable_does() -> None:
    program = "import os; from sdit.launch_environment import find_rank; print(find_rank(os.environ).describe())"
    unknown = [word for name in ("RANK", "SIZE") for word in ("-u", f"OMPI_COMM_WORLD_{name}")]
    output = launch(*MPIRUN, "2", "env", *unknown, sys.executable, "-c", program)
    ranks = [f"rank {rank} of 2, {rank} of 2 on this node; found by mpi4py" for rank in range(2)]
    # mpirun may run the lines of two ranks together.
    assert sorted(re.findall(r"rank \d of \d, \d of \d on this node; found by mpi4py", output)) == ranks
