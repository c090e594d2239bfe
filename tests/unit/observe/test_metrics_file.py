"""metrics.jsonl and events.jsonl: kept up to the point of resume, and no reason for a run to end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sdit.observe.metrics_file import MetricsFile, read_metrics, read_records
from sdit.train.clock import Clock


def tell(metrics: MetricsFile, steps: range) -> None:
    for step in steps:
        metrics.on_step(Clock(32 * step, step), {"step": step, "images_seen": 32 * step}, logged=True)


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
