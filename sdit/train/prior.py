"""The prior's assignment over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from sdit.config import ModelConfig, PriorConfig
from sdit.errors import CheckpointError
from sdit.model import Assignment, UnitMatcher


class PriorSchedule:
    """Solves the assignment every `prior.every_steps` steps. Between them, and after a resume, the last one is used.

    `columns` (depth * M,) is that assignment, or None before the first. Checkpoints store it.
    """

    def __init__(self, config: PriorConfig, model: ModelConfig) -> None:
        self._config, self._model = config, model
        self.is_on = model.variant == "switch" and config.weight > 0
        self._assignment: Assignment | None = None

    @cached_property
    def _matcher(self) -> UnitMatcher:
        return UnitMatcher(self._model)

    @property
    def columns(self) -> list[int] | None:
        return None if self._assignment is None else self._assignment.columns.tolist()

    def load(self, columns: list[int] | None, where: str) -> None:
        """Take over the assignment of the checkpoint `where`. Raises: CheckpointError if it is of another size."""
        self._assignment = None
        if columns is None:
            return
        units = self._model.depth * self._model.experts.count
        if len(columns) != units:
            raise CheckpointError(f"{where}: prior_columns has {len(columns)} entries; legal: {units}")
        self._assignment = Assignment(np.asarray(columns, dtype=np.int64), self._matcher.windows)

    def due(self, step: int) -> bool:
        """Return whether `at_step` solves the assignment, for which it needs the chosen experts."""
        return self.is_on and (step % self._config.every_steps == 0 or self._assignment is None)

    def at_step(self, step: int, experts: Callable[[], np.ndarray]) -> Assignment:
        """Return the assignment of a step. `experts` returns the chosen experts (depth, T, k)."""
        if self.due(step):
            self._assignment = self._matcher.match(experts())
        assert self._assignment is not None
        return self._assignment
