"""Saves routing maps of a run as arrays during training, and draws them when the run is complete."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdit.clock import Clock
from sdit.config import Config, ModelConfig
from sdit.expert_parallel.routing_table import task_weights
from sdit.model import Assignment
from sdit.model.windows import expert_windows
from sdit.observe.routing import Snapshot
from sdit.observe.sample_grids import remove_after
from sdit.observe.token_maps import TokenMap
from sdit.supervise.run_folder import RunFolder, anchored
from sdit.time_law import TimeLaw, prior_law
from sdit.train.events import ROUTING, Observer, OnFailure
from sdit.train.record import StepRecord

_log = logging.getLogger(__name__)


class RoutingMaps(Observer):
    """Writes RUN/routing when a map is due, which takes milliseconds. Nothing is drawn during training.

    images-N.npz are the gates of Switch-DiT, tokens-N.npz the counts of token-routed experts.
    """

    name, on_failure = "routing maps", OnFailure.RETRY

    def __init__(
        self, run_dir: Path | RunFolder, model: ModelConfig, weights: np.ndarray, windows: TimeLaw | None
    ) -> None:
        """Take the `task_weights`, and the law whose quantiles the prior's windows follow (`prior_law`)."""
        self._run_dir, self._model, self._task_weights, self._prior_law = run_dir, model, weights, windows
        self._dropped: np.ndarray | None = None
        self._total_images = 0
        self._is_complete, self._may_draw = False, True

    @classmethod
    def of(cls, config: Config, run_dir: Path | RunFolder) -> RoutingMaps:
        """Return the observer of a run."""
        return cls(run_dir, config.model, task_weights(config), prior_law(config))

    @property
    def _folder(self) -> Path:
        return self._run_dir / "routing"

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._total_images, self._is_complete = total_images, clock.images_seen >= total_images
        (anchored(self._run_dir) / "routing").mkdir(exist_ok=True)
        self.on_rollback(clock, message)

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        self._is_complete = clock.images_seen >= self._total_images
        if self._model.experts.capacity_factor is not None and record.dropped_by_block is not None:
            self._dropped = np.asarray(record.dropped_by_block, dtype=np.float32)
        if (counts := record.token_counts) is not None:
            found = TokenMap(
                clock.images_seen, self._model.moe_blocks, counts.by_time, counts.by_position, counts.dropped
            )
            found.save(self._folder / f"tokens-{clock.images_seen:012d}.npz")

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        assignment = None
        if columns is not None:
            assignment = Assignment(np.asarray(columns, dtype=np.int64), expert_windows(self._model, self._prior_law))
        top_k = self._model.experts.top_k
        snapshot = Snapshot.take(clock.images_seen, probs, top_k, assignment, self._dropped, self._task_weights)
        snapshot.save(self._path(clock))

    def on_stop(self, clock: Clock) -> None:
        self._may_draw = False

    def on_rollback(self, clock: Clock, text: str) -> None:
        remove_after(self._folder, clock.images_seen)

    def missing(self, clock: Clock) -> set[str]:
        return set() if self._model.variant != "switch" or self._path(clock).exists() else {ROUTING}

    def close(self) -> None:
        """Draw the maps of a complete run. A run that was stopped or failed must exit at once, so it draws nothing."""
        if self._is_complete and self._may_draw:
            from sdit.observe.routing_figures import draw_run  # imports matplotlib
            from sdit.observe.token_figures import draw_newest

            draw_run(self._folder, _log.warning)
            draw_newest(self._folder, _log.warning)

    def _path(self, clock: Clock) -> Path:
        return self._folder / f"images-{clock.images_seen:012d}.npz"
