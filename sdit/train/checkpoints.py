"""The periodic tasks that store state: checkpoints, with the way back to the newest one, and snapshots of averages."""

from __future__ import annotations

from pathlib import Path

from sdit.checkpoint.saver import Saver
from sdit.checkpoint.snapshots import SnapshotStore
from sdit.clock import StepSpan
from sdit.config import CheckpointConfig, EmaConfig
from sdit.errors import DataError
from sdit.supervise.heartbeat import Phase
from sdit.train.context import TrainContext


class Checkpoints:
    """Saves at intervals, and rolls back at most `rollbacks` times. All ranks call its methods together."""

    def __init__(
        self, context: TrainContext, config: CheckpointConfig, rollbacks: int, started_from: Path | None
    ) -> None:
        self._context, self._config, self._rollbacks = context, config, rollbacks
        state = context.state
        self.saver = Saver(
            state.store, context.comm, state.snapshot, config.asynchronous,
            lambda folder, seconds: context.observers.on_checkpoint(state.clock, folder, seconds),
            lambda text: context.event("checkpoint_failed", text),
        )  # fmt: skip
        self.saver.saved_at = state.clock.images_seen
        if started_from is not None:
            self.saver.last = str(started_from)
        self._rolled_back = len(state.clock.left_out)

    def due(self, span: StepSpan) -> bool:
        """Return whether a checkpoint is due after a step. The last one of the run is saved by the loop."""
        return span.crosses(self._config.every_images, self._config.every_steps)

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint of this moment, unless it exists. Raises: CheckpointError, see `Saver.save`."""
        with self._context.task(Phase.CHECKPOINT, "checkpoint"):
            if must_succeed:
                self.saver.finish()
            if self.saver.saved_at != self._context.state.clock.images_seen:
                self.saver.save(must_succeed)

    @property
    def can_roll_back(self) -> bool:
        """Whether a roll-back is left, and a checkpoint to go back to."""
        return self._rolled_back < self._rollbacks and self.saver.last != "none"

    def roll_back(self, reason: str) -> str:
        """Load the newest checkpoint and skip the samples from there up to this step's, these included; return what was done.

        Raises: DataError if no roll-back is left, or if there is no checkpoint.
        """
        state, global_batch = self._context.state, self._context.run.batch.global_batch
        clock = state.clock
        if self._rolled_back >= self._rollbacks:
            raise DataError(f"{reason}; last good checkpoint: {self.saver.last}")
        self._context.heartbeat.enter(Phase.CHECKPOINT, clock.steps)
        self.saver.finish()
        found = state.store.newest()
        if found is None:
            raise DataError(f"{reason}; no checkpoint to go back to")
        state.load(found)
        self._rolled_back += 1
        state.clock = state.clock.leaving_out(clock.first_sample + global_batch)
        self.saver.saved_at = state.clock.images_seen
        if self._context.comm.is_first:
            state.store.begin(state.clock.images_seen)
        first, count = state.clock.left_out[-1]
        return f"{reason}; back to {found.folder.name}, samples {first}..{first + count - 1} are left out"


class Snapshots:
    """Saves the power-function averages at intervals. All ranks call its methods together.

    A snapshot is written before the checkpoint of the same step, so that no resumed run misses it.
    """

    def __init__(self, context: TrainContext, config: EmaConfig, store: SnapshotStore) -> None:
        self._context, self._config, self._store = context, config, store
        self._saver = Saver(
            store, context.comm, context.state.power_snapshot, False,
            lambda folder, seconds: context.event("ema_snapshot", f"{folder.name} in {seconds:.2f} s"),
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
