"""Laws of the process pool."""

import os

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
