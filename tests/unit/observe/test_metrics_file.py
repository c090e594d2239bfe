"""metrics.jsonl and events.jsonl: kept up to the point of resume, and no reason for a run to end."""

from __future__ import annotations

import errno
import io
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sdit.clock import Clock
from sdit.observe import json_lines
from sdit.observe.metrics_file import MetricsFile, read_metrics, read_records
from sdit.train.events import VALIDATION
from sdit.train.record import StepRecord, Validation


def tell(metrics: MetricsFile, steps: range) -> None:
    for step in steps:
        metrics.on_step(Clock(32 * step, step), StepRecord(step=step, images_seen=32 * step, logged=True))


def test_lines_after_the_point_of_resume_are_written_anew(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start(Clock(), 320, "fresh")
    tell(metrics, range(1, 6))
    metrics.on_rollback(Clock(64, 2), "back")
    tell(metrics, range(3, 5))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """A write beyond `largest_file` bytes of a file fails as on a full file system, after a part of it was written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_lines_wait_for_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All lines are in the file once there is space, in order. One warning is logged when the wait begins and one at its end."""
    metrics, path = MetricsFile(tmp_path), tmp_path / "metrics.jsonl"
    metrics.on_start(Clock(), 320, "fresh")
    tell(metrics, range(1, 3))
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        with full_disk(len(before) + 5):
            tell(metrics, range(3, 6))
            assert path.read_bytes() == before, "a part of a line was left"
        tell(metrics, range(6, 8))
    records, torn = read_records(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7] and torn == 0
    first, last = (record.message for record in caplog.records)
    assert "lines wait until they can be written (File too large)" in first
    assert last.endswith("can be written again: 3 lines had waited, 0 are lost")


class FailingClose(io.FileIO):
    """A file on a network file system with a full disk: writes end in memory, and only close reports that they do not fit."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lines_whose_file_fails_to_close_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start(Clock(), 320, "fresh")
    tell(metrics, range(1, 2))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, *_, **__: FailingClose(path, "ab"))
        tell(metrics, range(2, 4))
    tell(metrics, range(4, 5))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_waiting_lines_are_written_when_the_run_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics, path = MetricsFile(tmp_path), tmp_path / "metrics.jsonl"
    with full_disk(5):
        tell(metrics, range(1, 3))
    metrics.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with full_disk(path.stat().st_size), caplog.at_level(logging.WARNING):
        tell(metrics, range(3, 6))
        metrics.close()
    assert caplog.records[-1].message.endswith("3 lines are lost (File too large)")


def test_waiting_lines_are_bounded_and_the_oldest_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(json_lines, "MOST_WAITING", 3)
    metrics = MetricsFile(tmp_path)
    with full_disk(5):
        tell(metrics, range(1, 6))
    tell(metrics, range(6, 7))
    assert [record["step"] for record in read_metrics(tmp_path)] == [4, 5, 6]
    assert caplog.records[-1].message.endswith("2 lines had waited, 3 are lost")


def test_lines_that_wait_are_forgotten_by_a_roll_back(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    with full_disk(5):
        tell(metrics, range(1, 6))
    metrics.on_rollback(Clock(64, 2), "back")
    tell(metrics, range(3, 4))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_held_out_loss_that_came_late_joins_the_line_of_its_step(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start(Clock(), 320, "fresh")
    assert metrics.missing(Clock()) == set()
    tell(metrics, range(1, 4))
    resumed = MetricsFile(tmp_path)
    resumed.on_start(Clock(96, 3), 320, "resumed")
    assert resumed.missing(Clock(96, 3)) == {VALIDATION}
    assert resumed.missing(Clock(128, 4)) == set()  # of another step nothing is known
    resumed.on_validation(Clock(96, 3), Validation(validation_loss=0.5))
    assert resumed.missing(Clock(96, 3)) == set()
    assert [record.get("validation_loss") for record in read_metrics(tmp_path)] == [None, None, 0.5]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_held_out_loss_that_finds_no_room_leaves_the_file_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start(Clock(), 320, "fresh")
    tell(metrics, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with full_disk(10):
        metrics.on_validation(Clock(64, 2), Validation(validation_loss=0.5))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and "File too large" in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_events_bear_the_time_of_day(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    MetricsFile(tmp_path).on_event(Clock(32, 1), "loss_spike", "loss 7")
    (event,), _ = read_records(tmp_path / "events.jsonl")
    assert before <= datetime.fromisoformat(event["time"]) <= datetime.now(UTC)
