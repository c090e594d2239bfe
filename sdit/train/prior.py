"""The prior's assignment over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdit.config import ModelConfig, PriorConfig
from sdit.errors import CheckpointError
from sdit.model import Assignment, match_units
from sdit.model.windows import expert_windows


class PriorSchedule:
    """Solves the assignment every `prior.every_steps` steps. Between them, and after a resume, the last one is used.

    `columns` (depth * M,) is that assignment, or None before the first. Checkpoints store it.
    """

    def __init__(self, config: PriorConfig, model: ModelConfig) -> None:
        self._config, self._model = config, model
        self._is_on = model.variant == "switch" and config.weight > 0
        self._assignment: Assignment | None = None
        self.columns: list[int] | None = None

    def load(self, columns: list[int] | None, where: str) -> None:
        """Take over the assignment of the checkpoint `where`. Raises: CheckpointError if it is of another size."""
        units = self._model.depth * self._model.experts.count
        if columns is not None and len(columns) != units:
            raise CheckpointError(f"{where}: prior_columns has {len(columns)} entries; legal: {units}")
        self.columns, self._assignment = columns, None

    def at_step(self, step: int, experts: Callable[[], np.ndarray]) -> Assignment | None:
        """The assignment of a step. `experts` returns the chosen experts (depth, T, k). None: there is no prior."""
        if not self._is_on:
            return None
        if step % self._config.every_steps == 0 or self.columns is None:
            self._assignment = match_units(experts(), self._model)
            self.columns = self._assignment.columns.tolist()
        elif self._assignment is None:
            self._assignment = Assignment(np.asarray(self.columns, dtype=np.int64), expert_windows(self._model))
        return self._assignment
