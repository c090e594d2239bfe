"""When the prior's assignment is solved: at its interval, at the interval that `auto` chose, and after a resume."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from sdit.config import ModelConfig, PriorConfig
from sdit.train.prior import MAX_SHARE, MEASURED_STEPS, PriorSchedule, interval

MODEL = ModelConfig.model_validate(
    {"variant": "switch", "depth": 2, "timesteps": 40, "experts": {"count": 4, "top_k": 2}}
)


def _experts(step: int) -> np.ndarray:
    rng = np.random.default_rng(step)
    return np.argsort(rng.random((2, 40, 4)), axis=2)[:, :, :2]


def _schedule(every_steps: int | str) -> PriorSchedule:
    return PriorSchedule(PriorConfig.model_validate({"every_steps": every_steps}), MODEL)


def _first(value: int) -> int:
    return value


def test_steps_between_two_solutions_use_the_last_one() -> None:
    schedule = _schedule(3)
    columns = [schedule.at_step(step, lambda step=step: _experts(step)).columns for step in range(7)]
    for step in range(7):
        assert (columns[step] is columns[step - step % 3]) and schedule.due(step) == (step % 3 == 0)
    assert columns[0] is not columns[3]


def test_a_resumed_schedule_continues_with_the_stored_assignment() -> None:
    schedule, resumed = _schedule(3), _schedule(3)
    for step in range(4):
        schedule.at_step(step, lambda step=step: _experts(step))
    resumed.load(schedule.columns, None, "checkpoint")
    assert not resumed.due(4)
    for step in range(4, 9):
        before, after = (each.at_step(step, lambda step=step: _experts(step)) for each in (schedule, resumed))
        assert np.array_equal(before.columns, after.columns)


def test_auto_chooses_once_and_keeps_its_choice_over_a_resume() -> None:
    schedule = _schedule("auto")
    chosen = [
        schedule.end_step(1e-9, _first) for _ in range(MEASURED_STEPS) if schedule.at_step(0, lambda: _experts(0))
    ]
    assert chosen[:-1] == [None] * (MEASURED_STEPS - 1) and chosen[-1] == schedule.every_steps is not None
    assert all(schedule.end_step(1e9, _first) is None for _ in range(2 * MEASURED_STEPS))
    resumed = _schedule("auto")
    resumed.load(schedule.columns, schedule.chosen, "checkpoint")
    assert [resumed.due(step) for step in range(9)] == [schedule.due(step) for step in range(9)]
    assert all(resumed.end_step(1e9, _first) is None for _ in range(2 * MEASURED_STEPS))


def test_all_ranks_use_the_interval_of_rank_0() -> None:
    schedule = _schedule("auto")
    for _ in range(MEASURED_STEPS):
        schedule.end_step(1.0, lambda _: 8)
    assert schedule.every_steps == 8


def test_an_interval_of_the_config_replaces_the_stored_one() -> None:
    schedule = _schedule(5)
    schedule.load(None, 64, "checkpoint")
    assert schedule.every_steps == 5 and schedule.chosen is None


@pytest.mark.parametrize("solution", [0.0, 1e-4, 0.007, 0.45, 14.0])
@pytest.mark.parametrize("other", [0.03, 0.1, 2.0])
def test_a_solution_takes_at_most_one_percent(solution: float, other: float) -> None:
    steps = interval(solution, other + solution)
    assert solution <= MAX_SHARE * steps * other * (1 + 1e-9)
    assert steps == 1 or solution > MAX_SHARE * (steps // 2) * other * (1 - 1e-9)


@pytest.mark.parametrize("value", [0, -1, 1.5, "often", True])
def test_an_illegal_interval_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        PriorConfig.model_validate({"every_steps": value})
