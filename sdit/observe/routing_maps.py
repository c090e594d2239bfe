"""Keeps the gates' snapshots of a run and has them drawn by a process of its own, so that training does not wait."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import sdit
from sdit.config import ModelConfig
from sdit.model import Assignment
from sdit.model.windows import expert_windows
from sdit.observe.pictures import remove_after
from sdit.observe.routing import Snapshot
from sdit.observe.routing_drawer import undrawn
from sdit.supervise.run_folder import RunFolder
from sdit.train.clock import Clock
from sdit.train.events import ROUTING, Observer, OnFailure
from sdit.train.record import StepRecord

FINISH_SECONDS = 20.0  # at the end of the run; what is not drawn by then is drawn when the run goes on
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_log = logging.getLogger(__name__)


class RoutingMaps(Observer):
    """Writes RUN/routing/images-N.npz (a few milliseconds); pictures appear beside it when they are drawn."""

    name, on_failure = "routing maps", OnFailure.RETRY

    def __init__(self, run_dir: Path | RunFolder, model: ModelConfig, finish_seconds: float = FINISH_SECONDS) -> None:
        self._run_dir, self._model, self._finish_seconds = run_dir, model, finish_seconds
        self._dropped: np.ndarray | None = None
        self._drawer: subprocess.Popen[str] | None = None
        self._warned, self._may_wait = False, True
        self._total_images = self._images_left = 0

    @property
    def _folder(self) -> Path:
        return self._run_dir / "routing"

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._total_images, self._images_left = total_images, total_images - clock.images_seen
        self._folder.mkdir(exist_ok=True)
        self.on_rollback(clock, message)
        self._draw()

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        self._images_left = self._total_images - clock.images_seen
        if self._model.experts.capacity_factor is not None and record.dropped_by_block is not None:
            self._dropped = np.asarray(record.dropped_by_block, dtype=np.float32)

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        assignment = None
        if columns is not None:
            assignment = Assignment(np.asarray(columns, dtype=np.int64), expert_windows(self._model))
        snapshot = Snapshot.take(clock.images_seen, probs, self._model.experts.top_k, assignment, self._dropped)
        snapshot.save(self._path(clock))
        self._draw()

    def on_stop(self, clock: Clock) -> None:
        self._may_wait = False

    def on_rollback(self, clock: Clock, text: str) -> None:
        remove_after(self._folder, clock.images_seen)

    def missing(self, clock: Clock) -> set[str]:
        return set() if self._path(clock).exists() else {ROUTING}

    def close(self) -> None:
        """Wait for the last pictures, but only of a run that is done: one that stops or fails must leave at once."""
        is_done = self._images_left <= 0 and self._may_wait
        deadline = time.monotonic() + (self._finish_seconds if is_done else 0.0)
        self._await(deadline)
        if time.monotonic() < deadline:  # a drawer that was about to end may have missed the last snapshot
            self._draw()
            self._await(deadline)

    def _path(self, clock: Clock) -> Path:
        return self._folder / f"images-{clock.images_seen:012d}.npz"

    def _draw(self) -> None:
        """Start a drawer if there is something to draw and none is at it."""
        if self._drawer is not None:
            if self._drawer.poll() is None:
                return
            self._bury()
        if not self._folder.is_dir() or not undrawn(self._folder):
            return
        root = str(Path(sdit.__file__).resolve().parent.parent)
        paths = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        command = [sys.executable, "-m", "sdit.observe.routing_drawer", str(self._folder.resolve())]
        with (self._folder / ".drawer.log").open("w", encoding="utf-8") as said:
            self._drawer = subprocess.Popen(
                command, env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths}, stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, text=True,
            )  # fmt: skip

    def _await(self, deadline: float) -> None:
        if self._drawer is None:
            return
        try:
            self._drawer.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._drawer.kill()
            self._drawer.wait()
            _log.info("%s: maps that are not drawn yet will be when the run goes on", self._folder)
            self._drawer = None
            return
        self._bury()

    def _bury(self) -> None:
        """The drawer has ended: say why, once, if it failed."""
        assert self._drawer is not None
        code, self._drawer = self._drawer.returncode, None
        if code in (0, -signal.SIGTERM, -signal.SIGINT) or self._warned:  # a stop of the run reaches the drawer, too
            return
        self._warned = True
        said = (self._folder / ".drawer.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        _log.warning("%s: drawing failed: %s", self._folder, said[-1] if said else f"exit code {code}")
