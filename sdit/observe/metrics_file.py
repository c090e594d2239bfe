"""Writes metrics.jsonl, one JSON object per logged step. Lines after the point of resumption are removed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdit.clock import Clock
from sdit.files import replace_text
from sdit.observe.json_lines import WaitingLines
from sdit.redact import redact
from sdit.supervise.run_folder import RunFolder, anchored
from sdit.train.events import VALIDATION, Observer
from sdit.train.record import StepRecord, Validation

_log = logging.getLogger(__name__)
KEY = "validation_loss"
SPENT = (  # seconds of rank 0, summed over the steps since the last logged one
    "step_seconds", "data_wait_seconds", "forward_backward_seconds", "exchange_wait_seconds", "optimizer_seconds",
    "checkpoint_seconds", "sample_seconds", "validation_seconds",
)  # fmt: skip


class MetricsFile(Observer):
    """Appends logged steps to RUN/metrics.jsonl and events to RUN/events.jsonl. On a full disk lines wait in memory."""

    def __init__(self, run_dir: Path | RunFolder) -> None:
        self._run_dir = run_dir
        self._spent = dict.fromkeys(SPENT, 0.0)
        self._metric_lines, self._event_lines = WaitingLines(), WaitingLines()

    @property
    def _metrics(self) -> Path:
        return anchored(self._run_dir) / "metrics.jsonl"

    @property
    def _events(self) -> Path:
        return anchored(self._run_dir) / "events.jsonl"

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self.on_rollback(clock, message)
        self._metrics.touch()
        self.on_event(clock, "start", message)

    def on_rollback(self, clock: Clock, text: str) -> None:
        """Remove lines that the resumed run writes again, and an incomplete last line."""
        self._metric_lines.keep(lambda line: _images(line) <= clock.images_seen)
        if self._metrics.exists():
            lines = self._metrics.read_text(encoding="utf-8").splitlines()
            self._rewrite([line for line in lines if _images(line) <= clock.images_seen])

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        for key in SPENT:
            self._spent[key] += getattr(record, key) or 0.0
        if record.logged:
            # Most periodic tasks run between two logged steps, so only the sums include their time.
            self._metric_lines.append(
                self._metrics, json.dumps(replace(record, spent_since_logged=self._spent).as_dict())
            )
            self._spent = dict.fromkeys(SPENT, 0.0)

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        """Add the held-out loss to the line of its step. If the disk is full, it is missing until the next start."""
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        if not lines or _images(lines[-1]) != clock.images_seen:
            return
        try:
            self._rewrite([*lines[:-1], json.dumps({**json.loads(lines[-1]), **validation.as_dict()})])
        except OSError as error:
            problem = f"the held-out loss could not be written ({error.strerror})"
            _log.warning("%s: %s; training continues", error.filename, problem)

    def missing(self, clock: Clock) -> set[str]:
        """Return VALIDATION if the last line is of this step and has no held-out loss, else an empty set."""
        last = read_metrics(self._metrics.parent)[-1:]
        incomplete = [record for record in last if record["images_seen"] == clock.images_seen and KEY not in record]
        return {VALIDATION} if incomplete else set()

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self.on_event(clock, "checkpoint", f"{folder.name} in {seconds:.2f} s")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        where = {"time": moment, "images_seen": clock.images_seen, "step": clock.steps}
        self._event_lines.append(self._events, json.dumps({**where, "event": kind, "text": redact(text)}))

    def _rewrite(self, lines: list[str]) -> None:
        try:
            replace_text(self._metrics, "".join(line + "\n" for line in lines))
        except OSError as error:
            error.filename = str(self._run_dir / "metrics.jsonl")
            raise

    def close(self) -> None:
        """Write the lines that wait. What still does not fit is lost, which is logged."""
        self._metric_lines.close(self._metrics)
        self._event_lines.close(self._events)


def _images(line: str) -> float:
    try:
        return float(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return all logged steps of a run, in order. An incomplete last line is ignored."""
    return read_records(run_dir / "metrics.jsonl")[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in a file of JSON lines, and the number of invalid lines.

    Raises: OSError: if the file cannot be read.
    """
    records, invalid = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            invalid += bool(line.strip())
    return records, invalid
