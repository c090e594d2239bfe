"""The prior's assignment over the steps of a run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cached_property

import numpy as np

from sdit.config import Config, ModelConfig, PriorConfig
from sdit.errors import CheckpointError
from sdit.model import Assignment, UnitMatcher
from sdit.time_law import TimeLaw, prior_law

MEASURED_STEPS = 20  # before `prior.every_steps: auto` chooses an interval
MAX_SHARE = 0.01  # of the time of a step, for the assignment


class PriorSchedule:
    """Solves the assignment every `prior.every_steps` steps. Between them, and after a resume, the last one is used.

    `columns` (depth * M,) is that assignment, or None before the first. `every_steps` is the interval, or None if `auto` has
    not chosen it yet. Checkpoints store the columns and the choice of `auto`, so that a resumed run solves at the same steps.
    """

    def __init__(self, config: PriorConfig, model: ModelConfig, law: TimeLaw | None = None) -> None:
        """`law`: the law whose quantiles the windows follow (`prior_law`); None: they follow t."""
        self._config, self._model, self._law = config, model, law
        self.is_on = model.variant == "switch" and config.weight > 0
        self.every_steps = None if config.every_steps == "auto" else config.every_steps
        self._assignment: Assignment | None = None
        self._solve_seconds = 0.0  # in the present step
        self._measured: list[tuple[float, float]] = []  # seconds of the solution and of the step

    @classmethod
    def of(cls, config: Config) -> PriorSchedule:
        """Return the schedule of a run."""
        return cls(config.prior, config.model, prior_law(config))

    @cached_property
    def _matcher(self) -> UnitMatcher:
        return UnitMatcher(self._model, self._law)

    @property
    def columns(self) -> list[int] | None:
        return None if self._assignment is None else self._assignment.columns.tolist()

    @property
    def chosen(self) -> int | None:
        """The interval that `auto` has chosen, or None."""
        return self.every_steps if self._config.every_steps == "auto" else None

    def load(self, columns: list[int] | None, every_steps: int | None, where: str) -> None:
        """Take over the assignment and the interval of `auto` from the checkpoint `where`.

        Raises: CheckpointError if the assignment is of another size.
        """
        self._assignment, self._measured = None, []
        if self._config.every_steps == "auto":
            self.every_steps = every_steps
        if columns is None:
            return
        units = self._model.depth * self._model.experts.count
        if len(columns) != units:
            raise CheckpointError(f"{where}: prior_columns has {len(columns)} entries; legal: {units}")
        self._assignment = Assignment(np.asarray(columns, dtype=np.int64), self._matcher.windows)

    def due(self, step: int) -> bool:
        """Return whether `at_step` solves the assignment, for which it needs the chosen experts."""
        return self.is_on and (step % (self.every_steps or 1) == 0 or self._assignment is None)

    def at_step(self, step: int, experts: Callable[[], np.ndarray]) -> Assignment:
        """Return the assignment of a step. `experts` returns the chosen experts (depth, T, k)."""
        if self.due(step):
            chosen = experts()
            started = time.perf_counter()
            self._assignment = self._matcher.match(chosen)
            self._solve_seconds += time.perf_counter() - started
        assert self._assignment is not None
        return self._assignment

    def end_step(self, seconds: float, from_first: Callable[[int], int]) -> int | None:
        """End a step that took `seconds`. Return the interval if `auto` has chosen it now.

        `from_first` returns the value of rank 0. All ranks call it together, once in a run.
        """
        self._measured.append((self._solve_seconds, seconds))
        self._solve_seconds = 0.0
        if not self.is_on or self.every_steps is not None:
            self._measured = []
        if len(self._measured) < MEASURED_STEPS:
            return None
        solution, step = (statistics.median(each) for each in zip(*self._measured, strict=True))
        self.every_steps = from_first(interval(solution, step))
        return self.every_steps


def interval(solution_seconds: float, step_seconds: float) -> int:
    """Return the smallest power of two for which a solution takes at most 1 % of the steps until the next one.

    `step_seconds` is the time of a step with a solution in it.
    """
    other_seconds = max(step_seconds - solution_seconds, 1e-9)
    wanted = max(1.0, solution_seconds / (MAX_SHARE * other_seconds))
    return int(2 ** min(math.ceil(math.log2(wanted)), 20))
