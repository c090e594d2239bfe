"""Laws of `auto` by measured speeds: what a placement costs in seconds, and which one is the fastest."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from learned_gates import random_routes

from sdit.config import EXCHANGE_SPEEDS, Config, ExpertsConfig, ModelConfig, ParallelConfig, load_config
from sdit.errors import ConfigError
from sdit.expert_parallel.exchange_costs import describe, without_fixed
from sdit.expert_parallel.placement import ExpertPlacement, place_experts
from sdit.expert_parallel.strategy import Choice, Seconds, _cheapest_replicas, choose_exchange, worth_moving
from sdit.expert_parallel.traffic_model import ExpertFlops, Speeds, TrafficModel, UnitCosts, unit_costs

SPEEDS = Speeds(2.0, 4.0, 8.0, 0.25)
VALUES: dict[str, Any] = dict(zip(EXCHANGE_SPEEDS, astuple(SPEEDS), strict=True))


def test_unit_costs_in_seconds_follow_from_the_speeds() -> None:
    costs = UnitCosts(row_bytes=6, expert_bytes=5, ranks=3, forwards=2, speeds=SPEEDS, flops=ExpertFlops(10.0, 20.0))
    # 6 transfers of 6 bytes and 4 products of 20 FLOPs, shared by 3 ranks; weights to 2 ranks, 3 times.
    assert costs.transfer_cost == pytest.approx((6 * 6 / 2 + 4 * 20 / 8) / 3)
    assert costs.replica_cost == pytest.approx(3 * 2 * 5 / 4 / 3)
    assert costs.fixed_costs == (6 * 0.25, 3 * 0.25)
    assert costs.work_seconds(7) == pytest.approx(7 * 4 * 10 / 8 / 3)
    assert costs.moving_cost(12) == pytest.approx(12 / 2 / 3)
    plain = replace(costs, speeds=None)
    assert (plain.transfer_cost, plain.replica_cost, plain.fixed_costs) == (36, 30, (0, 0))
    assert plain.moving_cost(12) == 12


def test_flops_are_those_of_the_products() -> None:
    linear, mlp = (ExpertsConfig(kind=kind, mlp_ratio=4.0, top_k=2) for kind in ("linear", "mlp"))
    assert ExpertFlops.of(linear, tokens=4, width=3) == ExpertFlops(2 * 4 * 9, 2 * 4 * 9)
    assert ExpertFlops.of(mlp, tokens=4, width=3) == ExpertFlops(2 * 2 * (2 * 4 * 3 * 12), 0)


def _traffic(rng: np.random.Generator, depth: int) -> tuple[TrafficModel, np.ndarray]:
    routes = random_routes(rng, depth=depth, count=4, top_k=2, tasks=12)
    return TrafficModel(routes, ranks=2, per_rank=3), place_experts("index", routes, 2)


def _costs(rng: np.random.Generator, fixed: float) -> UnitCosts:
    speeds = Speeds(*rng.uniform(0.5, 8, size=3), transfer_seconds=fixed)
    return UnitCosts(int(rng.integers(1, 9)), int(rng.integers(1, 12)), ranks=2, speeds=speeds, flops=ExpertFlops(1, 2))


def test_seconds_are_the_sum_of_transfers_replicas_and_fixed_parts() -> None:
    rng = np.random.default_rng(0)
    traffic, owners = _traffic(rng, depth=3)
    costs = _costs(rng, fixed=0.5)
    replicated = np.array([[False] * 4, [True, False, False, False], [True] * 4])
    placement, assigned = ExpertPlacement(owners, replicated, 2), traffic.ranks_in_order()
    expected = [0.0, 0.0, 0.0]
    for block, tasks_and_ranks in product(range(3), zip(traffic.tasks, assigned, strict=True)):
        sent = 0
        for task, rank in zip(*tasks_and_ranks, strict=True):
            experts = [e for e in traffic.routes.experts[block, task] if not replicated[block, e]]
            sent += len({int(owners[block, e]) for e in experts} - {int(rank)})
        expected[block] += (sent * costs.transfer_cost + (sent > 0) * costs.fixed_costs[0]) / traffic.batches
    for block, count in ((1, 1), (2, 4)):
        expected[block] += count * costs.replica_cost + costs.fixed_costs[1]
    assert traffic.block_seconds(placement, costs, assigned) == pytest.approx(expected)
    assert traffic.cost(placement, costs, assigned) == pytest.approx(sum(expected))
    free = replace(costs, speeds=None)
    assert traffic.cost(placement, free, assigned) == traffic.bytes(placement, free, assigned)


@pytest.mark.parametrize("seed", range(6))
def test_no_set_of_replicas_is_faster_for_a_given_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traffic, owners = _traffic(rng, depth=1)
    costs, assigned = _costs(rng, fixed=1e-12), traffic.ranks_in_order()

    def seconds(replicated: np.ndarray) -> float:
        return traffic.cost(ExpertPlacement(owners, replicated, 2), costs, assigned)

    none = ExpertPlacement(owners, np.zeros((1, 4), dtype=bool), 2)
    found = seconds(_cheapest_replicas(traffic, none, assigned, costs))
    every = [seconds(np.array([subset])) for subset in product([False, True], repeat=4)]
    assert found == pytest.approx(min(every), rel=1e-8)  # the solver rounds to 2^-30 of the sum


@pytest.mark.parametrize("fixed", [1e-12, 0.3, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_auto_is_never_slower_than_samples_or_weights(seed: int, fixed: float) -> None:
    rng = np.random.default_rng(seed)
    traffic, owners = _traffic(rng, depth=2)
    costs = _costs(rng, fixed)
    auto = choose_exchange("auto", traffic, owners, costs)
    assert auto.seconds is not None
    assert auto.seconds.exchange == traffic.cost(auto.placement, costs)
    assert auto.seconds.exchange <= min(auto.seconds.all_samples, auto.seconds.all_weights)
    assert auto.bytes == traffic.bytes(auto.placement, costs)
    assert auto.cost == auto.seconds.exchange + (auto.load_imbalance - 1) * auto.seconds.mean_work
    if fixed == 100.0:  # weights need half as many transfers as samples, and a block needs one of both
        assert auto.placement.replicated.all()


def test_slow_gathers_leave_no_replica_and_slow_products_send_no_sample() -> None:
    traffic, owners = _traffic(np.random.default_rng(3), depth=2)
    base = UnitCosts(4, 4, ranks=2, flops=ExpertFlops(1, 1))
    for speeds, replicated in ((Speeds(1, 1e-9, 1, 1e-12), False), (Speeds(1e9, 1, 1e-9, 1e-12), True)):
        choice = choose_exchange("auto", traffic, owners, replace(base, speeds=speeds))
        transfers = traffic.transfers(choice.placement)
        assert not choice.placement.replicated.any() if not replicated else transfers == 0


def test_a_move_is_repaid_in_seconds() -> None:
    costs = UnitCosts(1, 1, ranks=2, speeds=SPEEDS)
    now, then = (
        Choice(ExpertPlacement(np.array([owners]), np.zeros((1, 2), dtype=bool), 2), 1, 1, 1, 1, 1.0, Seconds(each, 0, 0, 0))
        for owners, each in (([0, 1], 3.0), ([1, 0], 1.0))
    )  # fmt: skip
    # Two experts of 3 float32 parameters in 4 copies at 2 bytes per second and rank: 24 s, repaid by 2 s per micro-step.
    assert costs.moving_cost(2 * 3 * 4 * 4) == 24
    assert not worth_moving(now, then, costs, 3, 12) and worth_moving(now, then, costs, 3, 13)
    assert "3000.00 ms" in now.reason and "\n" not in now.reason


def test_a_transfer_has_a_part_that_grows_with_its_bytes() -> None:
    assert without_fixed(10.0, 2.0) == 8.0 and without_fixed(10.0, 20.0) == 5.0
    assert "250000 us" in describe(SPEEDS) and "\n" not in describe(SPEEDS)


def test_given_speeds_reach_the_unit_costs() -> None:
    model = ModelConfig(variant="switch", experts=ExpertsConfig(kind="mlp"))
    given = unit_costs(model, ParallelConfig(exchange_costs=VALUES, activation_checkpointing="block"), 2, 4)
    assert given.speeds == SPEEDS and given.forwards == 2 and given.flops.sample > 0
    for kind in ("auto", "bytes", "measured"):
        assert unit_costs(model, ParallelConfig(exchange_costs=kind), 2, 4).speeds is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fast", ["parallel.exchange_costs", "'fast'", "'auto', 'bytes' or 'measured'"]),
        ("{flops_per_second: 1e12}", ["parallel.exchange_costs", "missing", "(all_to_all_bytes_per_second, gather"]),
        ("{}", ["parallel.exchange_costs", "missing", "transfer_seconds)"]),
        (str(VALUES | {"transfer_seconds": 0}).replace("'", ""), ["parallel.exchange_costs", "greater than 0"]),
        (str(VALUES | {"more": 1.5}).replace("'", ""), ["parallel.exchange_costs", "unknown keys (more)"]),
    ],
)
def test_illegal_costs_are_refused_in_one_line(value: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"parallel.exchange_costs={value}"])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_legal_costs_are_read() -> None:
    assert Config().parallel.exchange_costs == "auto"
    text = "{" + ", ".join(f"{key}: {value}" for key, value in VALUES.items()) + "}"
    assert load_config(None, [f"parallel.exchange_costs={text}"]).parallel.exchange_costs == VALUES
