"""Percentiles over the ranks from sums of a fixed size, compared with those of every rank's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sdit.train.rank_work import LEAST_SECONDS, MOST_SECONDS, RESOLUTION, rank_report, work_share
from sdit.train.record import METRICS, StepRecord

FIELDS = ("rank_step_seconds_p50", "rank_step_seconds_p99", "slowest_rank")


def reported(seconds: Sequence[float]) -> dict:
    """What every rank reports. The collectives are those of ranks in one process."""
    sums = torch.stack([work_share(each) for each in seconds]).sum(0)
    packed: list[int] = []

    def collect(value: int) -> int:
        packed.append(value)
        return value

    for rank, mine in enumerate(seconds):
        rank_report(sums, mine, rank, collect)
    assert all(abs(value) < 2**63 for value in packed)
    first, last = (rank_report(sums, seconds[rank], rank, lambda _: min(packed)) for rank in (0, len(seconds) - 1))
    assert first == last
    return first


@pytest.mark.parametrize("world", [1, 2, 3, 7, 100, 511])
@pytest.mark.parametrize("spread", [1e-6, 0.01, 0.3, 3.0])
def test_percentiles_are_those_of_the_ranks_within_the_resolution(world: int, spread: float) -> None:
    generator = np.random.default_rng(world)
    for typical in (2e-3, 0.4, 30.0):
        seconds = typical * np.exp(spread * generator.standard_normal(world))
        seconds = seconds.clip(LEAST_SECONDS, 0.99 * MOST_SECONDS)
        found = reported(seconds.tolist())
        exact = np.percentile(seconds, [50, 99])
        assert [found[name] for name in FIELDS[:2]] == pytest.approx(exact, rel=RESOLUTION)
        assert seconds[found["slowest_rank"]] >= seconds.max() - 1e-6  # its number is rounded to a microsecond


def test_ranks_that_differ_by_more_than_the_resolution_are_exact() -> None:
    seconds = [1.0, 1.1, 5.0, 1.25]
    found = reported(seconds)
    assert [found[name] for name in FIELDS[:2]] == pytest.approx(np.percentile(seconds, [50, 99]), rel=1e-12)
    assert found["slowest_rank"] == 2


def test_one_slow_rank_of_a_hundred_shows() -> None:
    found = reported([1.0] * 99 + [5.0])
    assert found == {FIELDS[0]: 1.0, FIELDS[1]: pytest.approx(1.04), FIELDS[2]: 99}


def test_the_first_of_equal_ranks_is_the_slowest() -> None:
    assert reported([0.5, 2.0, 2.0])["slowest_rank"] == 1


def test_extreme_work_is_counted_at_the_ends() -> None:
    found = reported([1e-9, 1e5])
    assert found["rank_step_seconds_p50"] == pytest.approx(5e4) and found["slowest_rank"] == 1


def test_the_first_step_of_a_process_has_no_work_to_compare() -> None:
    assert reported([0.0, 0.0]) == {}


def test_the_reference_states_the_resolution() -> None:
    meaning = StepRecord.__dataclass_fields__["rank_step_seconds_p50"].metadata["meaning"]
    assert f"{100 * RESOLUTION:.1f} %" in meaning and set(FIELDS) <= set(METRICS)
