"""Writes checkpoints during a run, in the foreground or in the background. Failures are counted and need not end the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sdit.checkpoint.store import CheckpointStore, DiskFullError, Problem, Snapshot
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError

MAX_FAILURES = 3
Saved = Callable[[Path, float], None]
Failed = Callable[[str], None]


class Saver:
    """Writes `snapshot()` on request and reports the result to `saved(folder, seconds)` or `failed(text)`.

    All ranks call each method at the same step.
    """

    def __init__(
        self, store: CheckpointStore, comm: Comm, snapshot: Callable[[], Snapshot], asynchronous: bool,
        saved: Saved, failed: Failed,
    ) -> None:  # fmt: skip
        self._store, self._comm, self._snapshot, self._asynchronous = store, comm, snapshot, asynchronous
        self._saved, self._failed = saved, failed
        self._failures = 0
        self._writing: BackgroundWrite | None = None
        self._copies: dict[str, np.ndarray] = {}
        self.last = "none"
        # Images seen at the newest checkpoint that this process committed or started from.
        self.saved_at: int | None = None

    def flags(self) -> tuple[float, float, float]:
        """Return (written, failed, committed) of this rank's write in the background, each 0 or 1.

        The trainer sums them over ranks together with the losses of the step.
        """
        return self._writing.flags() if self._writing is not None else (0.0, 0.0, 0.0)

    def advance(self, written: float, failed: float, committed: float) -> None:
        """Continue a write in the background, given the sums of the flags over all ranks.

        Raises: CheckpointError: after `MAX_FAILURES` consecutive failures.
        """
        if self._writing is None:
            return
        try:
            folder = self._writing.advance(round(written), round(failed), round(committed))
        except CheckpointError as error:
            failed_write, self._writing = self._writing, None
            if isinstance(error, DiskFullError) and not failed_write.is_retry:
                self._writing = BackgroundWrite(self._store, self._comm, failed_write.snapshot, is_retry=True)
            else:
                self._report_failure(error, must_succeed=False)
            return
        if folder is not None:
            images_seen, seconds, self._writing = self._writing.images_seen, self._writing.seconds, None
            self._report_saved(images_seen, folder, seconds)

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint of the current state, or start to write it in the background.

        Raises: CheckpointError: if the write fails and `must_succeed` is True, or after `MAX_FAILURES` consecutive failures.
        """
        self.finish()
        if self._asynchronous and not must_succeed:
            self._writing = BackgroundWrite(self._store, self._comm, self._copied(self._snapshot()))
            return
        started, snapshot = time.perf_counter(), self._snapshot()
        try:
            folder = self._store.save(snapshot)
        except CheckpointError as error:
            self._report_failure(error, must_succeed)
            return
        self._report_saved(snapshot.images_seen, folder, time.perf_counter() - started)

    def finish(self) -> None:
        """Wait until the write in the background has ended."""
        while self._writing is not None:
            self._writing.wait()
            flags = torch.tensor(self.flags(), dtype=torch.float64, device=self._comm.device)
            self.advance(*self._comm.sum(flags).tolist())

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot in memory that the next step does not change. GPU state was already copied to the host.

        The buffers are reused. Measured for 605 MB: 0.27 s into new memory, 0.04 s into reused memory.
        """
        if not snapshot.is_live:
            return snapshot
        snapshot.wait()
        for key, flat in snapshot.tensors.items():
            if key not in self._copies or self._copies[key].shape != flat.shape:
                self._copies[key] = np.empty_like(flat)
            np.copyto(self._copies[key], flat)
        return replace(snapshot, tensors={key: self._copies[key] for key in snapshot.tensors})

    def _report_saved(self, images_seen: int, folder: Path, seconds: float) -> None:
        self._failures, self.last, self.saved_at = 0, str(folder), images_seen
        self._saved(folder, seconds)

    def _report_failure(self, error: CheckpointError, must_succeed: bool) -> None:
        self._failures += 1
        self._failed(str(error))
        if must_succeed or self._failures >= MAX_FAILURES:
            raise error


class BackgroundWrite:
    """A checkpoint that is written while the run continues. The all-reduce of each step carries its progress."""

    def __init__(self, store: CheckpointStore, comm: Comm, snapshot: Snapshot, is_retry: bool = False) -> None:
        self._store, self._comm, self.snapshot, self.is_retry = store, comm, snapshot, is_retry
        self.images_seen = snapshot.images_seen
        self._started = time.perf_counter()
        self._problem: Problem | None = None
        self._is_committing = False
        place = store.place(snapshot)  # together with the other ranks, so not in the thread
        self._run(lambda: self._store.write_shard(snapshot, place))

    def _run(self, action: Callable[[], Problem | None]) -> None:
        def work() -> None:
            try:
                self._problem = action()
            except Exception as error:  # otherwise the ended thread would count as a written shard
                self._problem = Problem(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=work, name="sdit-checkpoint", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """The seconds since the write began."""
        return time.perf_counter() - self._started

    def wait(self) -> None:
        self._thread.join()

    def flags(self) -> tuple[float, float, float]:
        """Return three flags, each 0 or 1.

        They say that this rank wrote its shard, that it failed, and that the checkpoint is committed (known to rank 0 only).
        """
        if self._thread.is_alive():
            return (0.0, 0.0, 0.0)
        if self._problem is not None:
            return (0.0, 1.0, 0.0)
        return (0.0, 0.0, float(self._comm.is_first)) if self._is_committing else (1.0, 0.0, 0.0)

    def advance(self, written: int, failed: int, committed: int) -> Path | None:
        """Take the next step of the write. Return the folder once the checkpoint is committed, else None.

        Raises: CheckpointError: on all ranks, if a rank failed.
        """
        if committed:
            return self._store.folder_of(self.snapshot.images_seen)
        if self._is_committing:
            if failed:
                self._store.agree(self._problem, self.snapshot.images_seen)
        elif written + failed == self._comm.world:
            self._store.agree(self._problem, self.snapshot.images_seen)
            self._is_committing = True
            if self._comm.is_first:
                self._run(lambda: self._store.commit(self.snapshot))
        return None
