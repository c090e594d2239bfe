"""The laws that only a GPU can show. They are the limits of the GPU check's stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdit.transfers import HostCopies

CHECK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees none")


@pytest.mark.parametrize("stage", ["numerics", "waits", "layouts", "training"])
def test_figures_of_the_stage_keep_their_limits(stage: str, tmp_path: Path) -> None:
    command = [sys.executable, str(CHECK), "--out", str(tmp_path), "--stages", stage, "--minutes", "20"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + (tmp_path / f"{stage}.log").read_text()[-3000:]
    limits = [row for row in json.loads((tmp_path / f"{stage}.json").read_text())["rows"] if row["is_good"] is not None]
    assert limits


def test_copies_of_state_hold_the_moment_they_began_at() -> None:
    """The host continues, the kernels that follow wait: a change after `begin` is not in the copy."""
    state = [torch.full((1 << 24,), float(number), device="cuda") for number in range(4)]
    copies = HostCopies()
    for turn in range(3):
        pending = copies.begin(state)
        for values in state:
            values.add_(1.0)
        pending.wait()
        assert all(host.is_pinned() for host in pending.tensors)
        assert [float(host.min()) for host in pending.tensors] == [turn + number for number in range(4)]
        assert [float(host.max()) for host in pending.tensors] == [turn + number for number in range(4)]
