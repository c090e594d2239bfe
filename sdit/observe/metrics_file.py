"""metrics.jsonl: one JSON object per logged step, and nothing after the point a run was resumed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sdit.train.clock import Clock
from sdit.train.events import Observer


class MetricsFile(Observer):
    """Appends logged steps to RUN/metrics.jsonl and events to RUN/events.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        _keep_up_to(self._metrics, clock.images_seen)
        self._file = self._metrics.open("a", encoding="utf-8", buffering=1)
        self.on_event(clock, "start", message)

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        if logged:
            self._file.write(json.dumps(metrics) + "\n")

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        pass

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
    """All logged steps of a run, in order."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
