"""A killed worker process that the kernel cannot end yet, as one that waits in a driver."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdit.config import SuperviseConfig
from sdit.launch_environment import SINGLE, RankInfo
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.supervise.rank_worker import RankWorker
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.stop_request import StopRequest
from sdit.supervise.worker import KILL_SECONDS, WorkerProcess, WorkerSpec, start_worker_process

PATIENCE_SECONDS = 30.0


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    """A worker that no signal of its supervisor reaches. The test ends it through its process id."""
    heartbeat = Heartbeat.create()
    heartbeat.enter(Phase.STEP, 7)
    spec = WorkerSpec(heartbeat.descriptor, attempt=2, parent=os.getpid(), stacks=os.memfd_create("stacks"))
    monkeypatch.setattr(WorkerProcess, "_signal", lambda *_: None)
    worker = start_worker_process(
        [sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), spec, heartbeat
    )
    yield worker
    if not worker.wait(0.0):
        os.kill(worker.pid, signal.SIGKILL)
        assert worker.wait(PATIENCE_SECONDS)


def within_patience(call: object) -> bool:
    """Whether a call returns in time. A call that hangs does not hang the test."""
    thread = threading.Thread(target=call, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(PATIENCE_SECONDS)
    return not thread.is_alive()


def test_a_python_without_memory_files_has_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of Python for old systems have no os.memfd_create."""
    monkeypatch.delattr(os, "memfd_create")
    heartbeat = Heartbeat.create()
    heartbeat.enter(Phase.STEP, 7)
    assert heartbeat.read().step == 7 and os.fstat(heartbeat.descriptor).st_nlink == 0


def test_kill_does_not_wait_and_a_process_that_remains_is_logged_once(
    worker: WorkerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    assert within_patience(worker.kill)
    with caplog.at_level(logging.WARNING):
        assert [worker.poll(KILL_SECONDS / 4) for _ in range(12)] == [None] * 12
    assert [record.getMessage() for record in caplog.records] == [
        f"process {worker.pid} was killed {KILL_SECONDS:g} s ago and still exists: a driver or a file system holds it"
    ]


def test_supervisor_goes_on_while_its_worker_ends_and_then_reports_why(worker: WorkerProcess, tmp_path: Path) -> None:
    """The deadline is the cause, whenever the process ends."""
    config = SuperviseConfig(step_seconds=5.0)
    member = SimpleNamespace(host="n1", rank=0)
    job = SimpleNamespace(observe=None, run_dir=Path("run"))
    rank = SimpleNamespace(job=job, config=config, info=RankInfo(0, 1, 0, 1, SINGLE), member=member)
    supervised = RankWorker(rank, RunFolder(tmp_path), start_worker_process, StopRequest(rank.info), "")  # type: ignore[arg-type]
    supervised.process = worker
    worker.poll(0.0)
    reports: list[ExitReport | None] = []
    for _ in range(3):  # at the second poll it is past its deadline
        assert within_patience(lambda: reports.append(supervised.poll(4.0)))
    assert supervised.process is worker and worker.is_killed and reports == [None] * 3
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while supervised.process is not None and time.monotonic() < deadline:
        reports.append(supervised.poll(0.1))
    report = reports[-1]
    assert report is not None and (report.cause, report.code, report.step) == ("stall", -signal.SIGKILL, 7)
