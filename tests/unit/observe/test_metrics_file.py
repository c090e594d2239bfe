"""metrics.jsonl and events.jsonl: kept up to the point of resume, and no reason for a run to end."""

from __future__ import annotations

import json
import logging
import resource
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sdit.clock import Clock
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


def test_a_full_disk_loses_lines_but_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.on_start(Clock(), 320, "fresh")
    tell(metrics, range(1, 3))
    kept = (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        tell(metrics, range(3, 6))
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    with kept.open("a") as file:
        file.write(json.dumps({"step": 5})[:6])  # what a full disk leaves of a line
    kept.replace(tmp_path / "metrics.jsonl")
    tell(metrics, range(6, 8))
    records, torn = read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 6, 7] and torn == 1
    assert caplog.records[-1].message.endswith("can be written again")


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
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # a write beyond it fails as on a full file system
    try:
        metrics.on_validation(Clock(64, 2), Validation(validation_loss=0.5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and "File too large" in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_events_bear_the_time_of_day(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    MetricsFile(tmp_path).on_event(Clock(32, 1), "loss_spike", "loss 7")
    (event,), _ = read_records(tmp_path / "events.jsonl")
    assert before <= datetime.fromisoformat(event["time"]) <= datetime.now(UTC)
