"""People see a bar on a terminal and one line per interval elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import termios
import time
from typing import Any

import pytest

from sdit.clock import Clock
from sdit.observe.progress import Progress, duration
from sdit.train.record import StepRecord

RECORD = {
    "loss": 0.25, "learning_rate": 1e-4, "grad_norm": 1.5, "images_per_second": 64.0, "step_seconds": 2.0,
    "data_wait_seconds": 0.5, "exchange_wait_seconds": 0.1,
}  # fmt: skip


def record(step: int = 1, **more: Any) -> StepRecord:
    return StepRecord(step=step, images_seen=128 * step, **{**RECORD, **more})


def take_steps(progress: Progress, steps: int, **more: Any) -> None:
    """A run of `steps` steps of 128 images."""
    progress.on_start(Clock(), 128 * steps, "fresh start")
    for step in range(1, steps + 1):
        progress.on_step(Clock(128 * step, step), record(step, **more))
    progress.close()


def test_a_log_file_gets_one_line_per_interval() -> None:
    stream = io.StringIO()
    take_steps(Progress(stream, line_every_seconds=3600), 50)
    message, first, last = stream.getvalue().splitlines()
    assert message == "fresh start"
    assert first.startswith("step 1  images 128/6400") and "ETA" in first
    assert last.startswith("step 50  images 6400/6400") and "ETA" not in last


def test_a_line_says_what_the_run_is_worth_and_what_it_waits_for() -> None:
    stream = io.StringIO()
    take_steps(Progress(stream, 0), 2, expert_load_max_over_mean=1.42, skipped_steps=3)
    line = stream.getvalue().splitlines()[-1]
    for words in (
        "loss 0.2500",
        "lr 1.0e-04",
        "64 images/s",
        "data 25%",
        "exchange 5%",
        "load 1.42 x mean",
        "skipped 3",
    ):
        assert words in line


def test_time_left_counts_pauses_between_the_steps() -> None:
    stream = io.StringIO()
    progress = Progress(stream, 0)
    progress.on_start(Clock(), 1000, "fresh start")
    progress.on_step(Clock(1, 1), record())
    time.sleep(0.3)  # a checkpoint: no step's seconds tell of it
    progress.on_step(Clock(2, 2), record())
    hours, minutes, seconds = map(int, stream.getvalue().split("ETA ")[-1].split()[0].split(":"))
    assert 3600 * hours + 60 * minutes + seconds >= 0.3 * 998 - 1


def test_a_terminal_gets_a_bar() -> None:
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(child, "w") as terminal:
        take_steps(Progress(terminal, 3600), 3)
        terminal.flush()
        shown = ""
        while select.select([parent], [], [], 0.2)[0]:
            shown += os.read(parent, 100_000).decode()
    os.close(parent)
    assert "100%" in shown and "384/384" in shown and "loss 0.2500" in shown
    assert "images 384/384" not in shown


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3723.4, "1:02:03"), (273_906, "3d 04:05:06")])
def test_durations_are_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
