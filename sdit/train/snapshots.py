"""The snapshots of the power-function averages as a periodic task."""

from __future__ import annotations

from pathlib import Path

from sdit.checkpoint.saver import Saver
from sdit.checkpoint.snapshots import SnapshotStore
from sdit.clock import StepSpan
from sdit.config import EmaConfig
from sdit.supervise.heartbeat import Phase
from sdit.train.context import TrainContext


class Snapshots:
    """Saves the power-function averages at intervals. All ranks call its methods together.

    A snapshot is written before the checkpoint of the same step, so that no resumed run misses it.
    """

    def __init__(self, context: TrainContext, config: EmaConfig, store: SnapshotStore) -> None:
        self._context, self._config, self._store = context, config, store
        self._saver = Saver(
            store, context.comm, context.state.power_snapshot, False, self._on_saved,
            lambda text: context.event("snapshot_failed", text),
        )  # fmt: skip

    def begin(self) -> None:
        """Set snapshots aside that are later than the present clock, because the run makes them again."""
        if self._context.comm.is_first:
            self._store.begin(self._context.state.clock.images_seen)

    def due(self, span: StepSpan) -> bool:
        """Return whether a snapshot is due after a step."""
        return span.crosses(self._config.snapshot_images)

    def save(self) -> None:
        """Write a snapshot of this moment. Raises: CheckpointError, see `Saver.save`."""
        with self._context.task(Phase.CHECKPOINT, "checkpoint"):
            self._saver.save()

    def _on_saved(self, folder: Path, seconds: float) -> None:
        self._context.event("ema_snapshot", f"{folder.name} in {seconds:.2f} s")
