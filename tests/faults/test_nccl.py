"""What NCCL does differently from gloo when a rank fails, shown without GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdit.cli.training_rank import has_lost_others
from sdit.config import SuperviseConfig
from sdit.errors import ExitCode
from sdit.supervise.heartbeat import Phase
from sdit.supervise.rank_worker import deadline_seconds
from tests.faults.ranks import Ranks

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
SCRIPT = Path(__file__).with_name("train_under_nccl.py")


def test_error_ends_the_run_though_leaving_the_group_would_wait_forever(tmp_path: Path) -> None:
    """The exit code and the text of the error arrive. Neither is lost in a stall that ends at a deadline."""
    command = [sys.executable, str(SCRIPT), "--config", str(TINY), "--run-dir", str(tmp_path / "run")]
    with Ranks(1, [*command, "train.steps=4"], tmp_path / "log") as ranks:
        assert ranks.codes() == [ExitCode.DATA], ranks.output
    (line,) = ranks.fatal
    assert "exit code 65 (shard-000003.tar: is not readable)" in line and "deadline" not in line


@pytest.mark.parametrize(
    ("text", "secondary"),
    [
        ("NCCL error in: a.cpp:1, invalid usage\nncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0", False),
        ("NCCL error in: a.cpp:1, unhandled system error\nncclSystemError: Bootstrap : no socket interface found", False),
        ("NCCL error in: a.cpp:1, unhandled cuda error\nncclUnhandledCudaError: out of memory", False),
        ("NCCL error in: a.cpp:1, remote process exited\nncclRemoteError: A call failed possibly", True),
        ("ncclSystemError: socketProgress: Connection closed by remote peer n1<41230>", True),
        ("NCCL communicator was aborted on rank 1. Original reason for failure was: timeout", True),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)", True),
        ("retrieving ncclUniqueId from [0] via c10d key-value store by store->get('0'), but store->get('0') got error: "
         "wait timeout after 600000ms", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1", True),
        ("Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
    ],
)  # fmt: skip
def test_error_is_secondary_only_if_another_rank_is_gone(text: str, secondary: bool) -> None:
    assert has_lost_others(RuntimeError(text)) == secondary


@pytest.mark.parametrize("config", [SuperviseConfig(), SuperviseConfig(step_seconds=7200.0)])
def test_collectives_wait_beyond_every_deadline(config: SuperviseConfig) -> None:
    """A supervisor ends the stalled rank, and kills take time, before a waiting rank is aborted."""
    assert config.collective_seconds > max(2 * deadline_seconds(config, phase) for phase in Phase)
