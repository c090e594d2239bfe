"""Progress of a run: a bar on a terminal, or one line per interval. Both are also written to the rank's log."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from sdit.clock import Clock
from sdit.train.events import Observer
from sdit.train.record import StepRecord

LINE_EVERY_SECONDS = 30.0
_log = logging.getLogger(__name__)


class Progress(Observer):
    """Prints loss, speed and remaining time. On rank 0 only, to stderr."""

    def __init__(self, stream: TextIO | None = None, line_every_seconds: float = LINE_EVERY_SECONDS) -> None:
        self._stream = stream or sys.stderr
        self._every = line_every_seconds
        self._bar: tqdm[Any] | None = None
        self._interval = Interval()
        self._total = 0
        self._line_due = -math.inf
        self._rate_from: tuple[float, int] | None = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._print(message)
        self._total = total_images
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_images, initial=clock.images_seen, unit="img", unit_scale=True, smoothing=0.1,
                file=self._stream, dynamic_ncols=True,
            )  # fmt: skip

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        now = time.monotonic()
        self._interval.add(record)
        if self._rate_from is None:  # the first step initialises libraries, so its time is not typical
            self._rate_from = (now, clock.images_seen)
        if self._bar is not None and not self._stream.isatty():  # the terminal is closed, so print lines from now on
            self._bar.close()
            self._bar = None
        if self._bar is not None:
            self._bar.set_postfix_str(self._interval.describe(short=True), refresh=False)
            self._bar.update(clock.images_seen - self._bar.n)
        done = clock.images_seen >= self._total
        if now < self._line_due and not done:
            return
        self._line_due = now + self._every
        line = f"step {clock.steps}  images {clock.images_seen}/{self._total}  {self._interval.describe()}"
        line += "" if done else f"  {self._time_left(now, clock.images_seen)}"
        _log.info("%s", line)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        self._interval.begin()

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self._print(f"checkpoint {folder} ({seconds:.2f} s)")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._print(f"{kind} at step {clock.steps}: {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, now: float, images_seen: int) -> str:
        """Return the remaining time by wall-clock time, which includes checkpoints, sampling and validation."""
        assert self._rate_from is not None
        since, first_images = self._rate_from
        if images_seen == first_images:
            return "ETA unknown"
        return f"ETA {duration((self._total - images_seen) * (now - since) / (images_seen - first_images))}"

    def _print(self, text: str) -> None:
        _log.info("%s", text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


class Interval:
    """Sums over the steps since the last printed line."""

    def __init__(self) -> None:
        self._last: StepRecord | None = None
        self._load: float | None = None
        self.begin()

    def begin(self) -> None:
        """Start the next interval."""
        self._seconds = self._waited = self._exchanged = 0.0
        self._images = 0.0

    def add(self, record: StepRecord) -> None:
        """Add a step."""
        self._last = record
        if record.expert_load_max_over_mean is not None:
            self._load = record.expert_load_max_over_mean
        seconds = record.step_seconds or 0.0
        self._seconds += seconds
        self._images += (record.images_per_second or 0.0) * seconds
        self._waited += record.data_wait_seconds or 0.0
        self._exchanged += record.exchange_wait_seconds or 0.0

    def describe(self, short: bool = False) -> str:
        """Return `loss 0.1234  lr 1.0e-04  812 images/s  data 2 %  exchange 5 %  load 1.42 x mean`."""
        record, seconds = self._last, max(self._seconds, 1e-9)
        assert record is not None and record.loss is not None
        words = [f"loss {record.loss:.4f}"]
        if record.learning_rate is not None:
            words.append(f"lr {record.learning_rate:.1e}")
        if short:
            return "  ".join(words)
        if record.grad_norm is not None:
            words.append(f"grad {record.grad_norm:.3g}")
        words.append(f"{self._images / seconds:.0f} images/s")
        if record.data_wait_seconds is not None:
            words.append(f"data {min(1.0, self._waited / seconds):.0%}")
        words.append(f"exchange {min(1.0, self._exchanged / seconds):.0%}")
        if self._load is not None:
            words.append(f"load {self._load:.2f} x mean")
        if record.skipped_steps:
            words.append(f"skipped {record.skipped_steps}")
        if record.bad_samples:
            words.append(f"bad samples {record.bad_samples}")
        return "  ".join(words)


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `3d 04:05:06`."""
    days, rest = divmod(round(max(0.0, seconds)), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    return f"{days}d {hours:02}:{minutes:02}:{left:02}" if days else f"{hours}:{minutes:02}:{left:02}"
