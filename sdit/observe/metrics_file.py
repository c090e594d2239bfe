"""metrics.jsonl: one JSON object per logged step, and nothing after the point a run was resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdit.train.clock import Clock
from sdit.train.events import Observer

SPENT = (  # seconds of rank 0, summed over the steps since the last logged one
    "step_seconds", "data_wait_seconds", "forward_backward_seconds", "exchange_wait_seconds", "optimizer_seconds",
    "checkpoint_seconds", "sample_seconds", "validation_seconds",
)  # fmt: skip


class MetricsFile(Observer):
    """Appends logged steps to RUN/metrics.jsonl and events to RUN/events.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
        self._spent = dict.fromkeys(SPENT, 0.0)

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self.on_rollback(clock, message)
        self.on_event(clock, "start", message)

    def on_rollback(self, clock: Clock, text: str) -> None:
        self.close()
        _keep_up_to(self._metrics, clock.images_seen)
        self._file = self._metrics.open("a", encoding="utf-8", buffering=1)

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        for key in SPENT:
            self._spent[key] += metrics.get(key, 0.0)
        if logged:
            # A pause falls between two steps that are seldom logged: only the sums tell where the time went.
            self._file.write(json.dumps({**metrics, "spent_since_logged": self._spent}) + "\n")
            self._spent = dict.fromkeys(SPENT, 0.0)

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self.on_event(clock, "checkpoint", f"{folder.name} in {seconds:.2f} s")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        with self._events.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"images_seen": clock.images_seen, "step": clock.steps, "event": kind, "text": text}) + "\n"
            )

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _keep_up_to(path: Path, images_seen: int) -> None:
    """Drop lines that the resumed run will write again, and a last line that a crash cut."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _images(line) <= images_seen]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _images(line: str) -> float:
    try:
        return float(json.loads(line)["images_seen"])
    except (ValueError, KeyError):
        return float("inf")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All logged steps of a run, in order; a last line that a crash cut is left out."""
    return read_records(run_dir / "metrics.jsonl")[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many of its lines are none. Raises: OSError."""
    records, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            torn += bool(line.strip())
    return records, torn
