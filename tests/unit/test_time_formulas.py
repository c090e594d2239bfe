"""The formulas of predicted times against cases computed by hand, their limits, and a simulation of failures."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

import pytest

from sdit.planner import time_formulas as formulas

RATIOS = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5)  # delta / (2 M), the one number that the best interval depends on


def test_mfu_is_interpolated_in_the_logarithm_of_the_width() -> None:
    measured = {64: 0.2, 256: 0.4}
    assert formulas.mfu_at_width(measured, 128) == pytest.approx(0.3)
    assert [formulas.mfu_at_width(measured, width) for width in (16, 64, 256, 4096)] == [0.2, 0.2, 0.4, 0.4]
    assert formulas.mfu_at_width({1152: 0.4}, 7) == 0.4


def test_times_computed_by_hand() -> None:
    assert formulas.compute_seconds(8e12, 2e12, 0.5) == 8.0
    assert formulas.memory_seconds(6e9, 2e9) == 3.0
    assert formulas.all_to_all_seconds(1e9, 10, 2e9, 0.01) == pytest.approx(0.6)
    assert formulas.all_reduce_seconds(4e9, 4, 1e9, 0.5) == pytest.approx(2 * 0.5 + 2 * 0.75 * 4)
    assert formulas.all_gather_seconds(4e9, 4, 1e9, 0.5) == pytest.approx(2 * 0.5 + 0.75 * 4)
    assert formulas.exposed_seconds(3.0, 2.0) == 1.0 and formulas.exposed_seconds(2.0, 3.0) == 0.0
    assert formulas.write_seconds(12e9, 2, 1e9, 4e9) == 6.0 and formulas.write_seconds(12e9, 8, 1e9, 4e9) == 3.0
    assert formulas.job_mtbf_seconds(1000, 500) == 7200.0
    assert formulas.days_of(86400 * 30, 10.0, 0.5) == 6.0
    assert formulas.cost_of(2.0, 8, 3.0) == 1152.0


@pytest.mark.parametrize("ranks", [2, 4, 8, 4096])
def test_a_reduction_and_a_gather_send_what_a_ring_sends(ranks: int) -> None:
    """Without fixed time, an all-reduce is a reduce-scatter and a gather: twice the bytes of a gather."""
    gather = formulas.all_gather_seconds(1e9, ranks, 1e9, 0.0)
    assert gather == pytest.approx((ranks - 1) / ranks)
    assert formulas.all_reduce_seconds(1e9, ranks, 1e9, 0.0) == pytest.approx(2 * gather)


@pytest.mark.parametrize("formula", [formulas.all_reduce_seconds, formulas.all_gather_seconds])
def test_one_rank_sends_nothing(formula: Callable[..., float]) -> None:
    assert formula(1e9, 1, 1e9, 1.0) == 0.0


@pytest.mark.parametrize(
    ("group", "per_node", "fraction"),
    [(1, 8, 0.0), (8, 8, 0.0), (4, 8, 0.0), (16, 8, 8 / 15), (2, 1, 1.0), (64, 8, 56 / 63)],
)
def test_bytes_that_leave_a_node(group: int, per_node: int, fraction: float) -> None:
    assert formulas.crossing_fraction(group, per_node) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("group", "stride", "per_node", "inside"), [(64, 1, 8, 8), (4, 1, 8, 4), (8, 8, 8, 1), (16, 4, 8, 2), (2, 16, 8, 1)]
)
def test_ranks_of_a_group_in_one_node(group: int, stride: int, per_node: int, inside: int) -> None:
    assert formulas.ranks_inside(group, stride, per_node) == inside
    ranks = range(0, group * stride, stride)
    assert (
        max(sum(rank // per_node == node for rank in ranks) for node in {rank // per_node for rank in ranks}) == inside
    )


def best_interval(stall: float, mtbf: float) -> float:
    """Return the exact minimum of Daly's expected time: the root of 1 - tau / M = e^(-(tau + delta) / M)."""
    low, high = 0.0, mtbf
    for _ in range(200):
        middle = (low + high) / 2
        if 1 - middle / mtbf > math.exp(-(middle + stall) / mtbf):
            low = middle
        else:
            high = middle
    return low


@pytest.mark.parametrize("ratio", RATIOS)
def test_dalys_interval_is_the_series_of_the_exact_one(ratio: float) -> None:
    """The first term that equation 37 leaves out has x^(3/2) of the first-order interval, with a coefficient below 1."""
    mtbf, stall = 3600.0, 2 * 3600.0 * ratio
    young = formulas.young_interval_seconds(stall, mtbf)
    assert abs(formulas.daly_interval_seconds(stall, mtbf) - best_interval(stall, mtbf)) <= young * ratio**1.5


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_interval_is_better_than_dalys_by_more_than_its_remainder(ratio: float) -> None:
    """Near the optimum tau*, the expected time is T* (1 + (tau - tau*)^2 / (2 M tau*)), by its second derivative.

    The bound has twice that, for the terms after it, and the rounding of a few operations.
    """
    mtbf, stall = 3600.0, 2 * 3600.0 * ratio
    found, exact = formulas.daly_interval_seconds(stall, mtbf), best_interval(stall, mtbf)
    best = formulas.goodput(exact, stall, 60.0, mtbf)
    remainder = formulas.young_interval_seconds(stall, mtbf) * ratio**1.5
    loss = 1 - formulas.goodput(found, stall, 60.0, mtbf) / best
    rounding = 8 * sys.float_info.epsilon
    assert -rounding <= loss <= remainder**2 / (mtbf * exact) + rounding
    assert all(formulas.goodput(found * factor, stall, 60.0, mtbf) < best for factor in (0.25, 0.5, 2, 4))


def test_young_and_daly_computed_by_hand() -> None:
    """Daly's figures 3 to 5 have delta = 5 min, and M = 24 h, 6 h and 15 min: 117, 57 and 9.1 min."""
    minutes = [formulas.daly_interval_seconds(300, hours * 3600) / 60 for hours in (24, 6, 0.25)]
    assert [float(f"{value:.2g}" if value < 10 else f"{value:.0f}") for value in minutes] == [117, 57, 9.1]
    assert formulas.young_interval_seconds(300, 24 * 3600) == pytest.approx(7200.0)
    assert formulas.daly_interval_seconds(1000, 400) == 400  # a stall of more than 2 M


def simulated_goodput(interval: float, stall: float, restart: float, mtbf: float, segments: int) -> tuple[float, float]:
    """Return the kept fraction of simulated work with failures of a Poisson process, and its standard error."""
    random_numbers, taken = random.Random(0), []
    for _ in range(segments):
        spent = 0.0
        while (until_failure := random_numbers.expovariate(1 / mtbf)) < interval + stall:
            spent += until_failure
            while (until_failure := random_numbers.expovariate(1 / mtbf)) < restart:
                spent += until_failure  # a failure during the restart
            spent += restart
        taken.append(spent + interval + stall)
    mean = sum(taken) / segments
    error = math.sqrt(sum((value - mean) ** 2 for value in taken) / segments / segments)
    return interval / mean, interval * error / mean**2


@pytest.mark.parametrize(
    ("stall", "restart", "mtbf"), [(10.0, 60.0, 3600.0), (60.0, 300.0, 3600.0), (30.0, 100.0, 600.0)]
)
def test_goodput_is_that_of_simulated_failures(stall: float, restart: float, mtbf: float) -> None:
    """Within four standard errors, which one in 16,000 seeds would miss. The seed is fixed."""
    interval = formulas.daly_interval_seconds(stall, mtbf)
    mean, error = simulated_goodput(interval, stall, restart, mtbf, 20_000)
    assert abs(formulas.goodput(interval, stall, restart, mtbf) - mean) < 4 * error


def test_goodput_without_failures_loses_the_stalls_only() -> None:
    assert formulas.goodput(100.0, 0.0, 60.0, 1e15) == pytest.approx(1.0)
    assert formulas.goodput(90.0, 10.0, 60.0, 1e15) == pytest.approx(0.9)
    best = [
        formulas.goodput(formulas.daly_interval_seconds(5.0, mtbf), 5.0, 60.0, mtbf)
        for mtbf in (1e3, 1e4, 1e6, 1e9, 1e13)
    ]
    assert best == sorted(best) and best[-1] == pytest.approx(1.0, abs=1e-5)


def test_goodput_is_zero_if_no_checkpoint_is_reached() -> None:
    assert formulas.goodput(1e6, 1.0, 1.0, 1.0) == 0.0 == formulas.goodput(1.0, 1.0, 1e6, 1.0)
