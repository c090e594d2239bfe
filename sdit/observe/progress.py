"""Progress for people: a bar on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sdit.train.clock import Clock
from sdit.train.events import Observer

LINE_EVERY_SECONDS = 30.0


class Progress(Observer):
    """Loss, images per second and time left; on rank 0 only."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._last_line = 0.0

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        print(message, file=sys.stderr)
        self._total = total_images
        self._started, self._first_images = time.monotonic(), clock.images_seen
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_images, initial=clock.images_seen, unit="img", unit_scale=True, smoothing=0.1)

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            self._bar.update(clock.images_seen - self._bar.n)
            return
        now = time.monotonic()
        done = clock.images_seen >= self._total
        if now - self._last_line < LINE_EVERY_SECONDS and not done:
            return
        self._last_line = now
        rate = (clock.images_seen - self._first_images) / max(now - self._started, 1e-9)
        left = (self._total - clock.images_seen) / max(rate, 1e-9)
        print(
            f"step {clock.steps}  images {clock.images_seen}/{self._total}  loss {metrics['loss']:.4f}  "
            f"grad_norm {metrics['grad_norm']:.3f}  {rate:.0f} images/s  {left:.0f} s left",
            file=sys.stderr,
        )

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        pass

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        self._say(f"checkpoint {folder} ({seconds:.2f} s)")

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        self._say(f"{kind} at step {clock.steps}: {text}")

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
