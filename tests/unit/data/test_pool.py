"""Laws of the process pool."""

import os
import signal
import time
from pathlib import Path

import pytest

from sdit.data.pool import run_tasks
from sdit.errors import SditError


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_done_once(jobs: int) -> None:
    assert sorted(run_tasks(abs, range(-20, 0), jobs)) == list(range(1, 21))


@pytest.mark.parametrize("jobs", [1, 2])
def test_errors_arrive_as_they_were_raised(jobs: int) -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(run_tasks(int, ["1", "one"], jobs))


def test_a_killed_worker_is_reported_in_one_line() -> None:
    with pytest.raises(SditError, match="a worker process was killed"):
        list(run_tasks(os._exit, [1], 2))


def kill_the_idle_worker(turn: int) -> int:
    """The second task waits until the worker of the first one is idle, and kills it."""
    if turn:
        parent = os.getppid()
        while not (others := idle_workers(parent)):
            time.sleep(0.05)
        time.sleep(0.5)  # the idle worker now waits for a task, with the lock of the queue of tasks
        os.kill(others[0], signal.SIGKILL)
        time.sleep(600)  # the pool ends this worker, and does not wait for it
    return turn


def idle_workers(parent: int) -> list[int]:
    """The other workers of a process. Its resource tracker is no worker."""
    children = (int(text) for text in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [
        child
        for child in children
        if child != os.getpid() and b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_a_worker_killed_with_the_lock_of_the_queue_does_not_stop_the_others() -> None:
    with pytest.raises(SditError, match="a worker process was killed"):
        list(run_tasks(kill_the_idle_worker, [0, 1], 2))
