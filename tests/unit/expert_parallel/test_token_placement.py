"""Which placement of token-routed experts their measured loads repay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sdit.config import ModelConfig, MoeConfig, ParallelConfig
from sdit.expert_parallel.placement import ExpertPlacement, expected_load_imbalance
from sdit.expert_parallel.rebalance import TokenRebalancer, even_placement
from sdit.expert_parallel.traffic_model import Speeds, UnitCosts, unit_costs
from sdit.model.moe.experts import build_token_experts
from sdit.topology import BatchPlan

LOADS = np.array([[8, 8, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [4, 1, 3, 2, 4, 1, 3, 2]])


def in_order(blocks: int, ranks: int, experts: int = 8) -> ExpertPlacement:
    owners = np.tile(np.arange(experts) // (experts // ranks), (blocks, 1))
    return ExpertPlacement(owners, np.zeros(owners.shape, dtype=bool), ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_an_even_placement_keeps_the_sizes_of_the_ranks_and_is_never_worse(ranks: int) -> None:
    present = in_order(3, ranks)
    found = even_placement(LOADS, present, 0)
    assert (np.sort(found.expert_to_rank) == present.expert_to_rank).all()
    before, after = expected_load_imbalance(LOADS, present), expected_load_imbalance(LOADS, found)
    assert (after <= before).all() and (ranks == 8 or after[0] < before[0])
    assert (found.expert_to_rank[1] == present.expert_to_rank[1]).all(), "even loads move nothing"


def test_only_blocks_move_whose_gain_repays_their_moves() -> None:
    """On two ranks the first block falls from 1.8 to 1 by four moves; the last is at 1 in order."""
    present = in_order(3, 2)
    assert expected_load_imbalance(LOADS, present).tolist() == [1.8, 1.0, 1.0]
    found = even_placement(LOADS, present, 0.19)
    moved = (found.expert_to_rank != present.expert_to_rank).sum(axis=1)
    assert moved.tolist() == [4, 0, 0] and expected_load_imbalance(LOADS, found)[0] == 1
    assert (even_placement(LOADS, present, 0.21).expert_to_rank == present.expert_to_rank).all()


class Placed:
    """Experts of one rank that owns all."""

    placement, is_restored = in_order(1, 1, 4), True


class Costs:
    """The costs of a run whose speeds are `speeds`, in float32."""

    def __init__(self, model: ModelConfig, ranks: int, speeds: Speeds | None) -> None:
        self._costs = replace(unit_costs(model, ParallelConfig(), 4, ranks), speeds=speeds)

    def unit_costs(self) -> UnitCosts:
        return self._costs


def rebalancer(placed: Any = None, speeds: Speeds | None = None, **moe: object) -> TokenRebalancer:
    config = MoeConfig.model_validate({"experts": 4, "top_k": 2, **moe})
    model = ModelConfig(variant="dit", depth=1, width=16, heads=2, patch_size=4, input_size=8, channels=1, moe=config)
    placed = Placed() if placed is None else placed
    costs = Costs(model, placed.placement.ranks, speeds)
    return TokenRebalancer(model, ParallelConfig(placement_refresh_images=64), BatchPlan(32, 8, 2), placed, costs)  # type: ignore[arg-type]


def test_choices_are_counted_from_check_to_check_at_any_layout() -> None:
    one, other = rebalancer(), rebalancer()
    for images in (0, 32):
        assert one.rebalance_if_due(images, None) is None  # type: ignore[arg-type]
        one.count(np.array([[3.0, 1.0, 0.0, 4.0]]))
    assert one.stored() == {"token_counts": [[6, 2, 0, 8]]}
    other.restore(one.stored())
    assert other.stored() == one.stored()
    assert one.rebalance_if_due(64, None) is None and one.stored() == {"token_counts": [[0, 0, 0, 0]]}  # type: ignore[arg-type]
    other.restore(None)
    assert other.stored() == one.stored()


def test_a_load_is_at_most_the_capacity() -> None:
    counts = np.array([[10, 2, 2, 2]])
    assert rebalancer()._served(counts).tolist() == counts.tolist()
    assert rebalancer(capacity_factor=1.25)._served(counts).tolist() == [[5, 2, 2, 2]]


class SharedPlaced:
    """Experts of one of two ranks, which log the placement that they adopt."""

    is_restored = True

    def __init__(self, kind: str) -> None:
        self.placement = in_order(1, 2, 4)
        self.layers = (build_token_experts(MoeConfig.model_validate({"experts": 4, "kind": kind}), 16, range(2)),)
        self.adopted: list[ExpertPlacement] = []

    def agree(self, placement: ExpertPlacement) -> ExpertPlacement:
        return placement

    def adopt(self, placement: ExpertPlacement, _: Any) -> int:
        self.adopted.append(placement)
        return 2


@pytest.mark.parametrize(("kind", "products"), [("mlp", 2), ("swiglu", 3)])
def test_a_move_costs_the_seconds_of_its_bytes_and_saves_those_of_waiting(kind: str, products: int) -> None:
    """The sample-routed law in seconds: gain x work of a rank x micro-steps against the bytes of all moves."""
    parameters = sum(each[0].numel() for each in SharedPlaced(kind).layers[0].parameters())
    hidden = MoeConfig.model_validate({"kind": kind}).hidden(16)
    pairs, bytes_per_second, flops_per_second = 2 * 8 * 4 * 2, 1e6, 1e9  # of both ranks: samples, tokens, k
    moving = parameters * 4 * 4 / bytes_per_second / 2
    work = 3 * pairs * 2 * products * 16 * hidden / flops_per_second / 2
    micro_steps = 64 / 16
    speeds = Speeds(bytes_per_second, 1.0, flops_per_second, 1.0)
    found = rebalancer(SharedPlaced(kind), speeds, kind=kind)._imbalance_of_a_move()
    assert found == pytest.approx(moving / (work * micro_steps))
    in_bytes = rebalancer(SharedPlaced(kind), kind=kind)._imbalance_of_a_move()
    assert in_bytes == pytest.approx(parameters * 4 * 4 / (pairs / 2 * 2 * 2 * 16 * 4 * micro_steps))


@pytest.mark.parametrize(("bytes_per_second", "moves"), [(1e12, 1), (1e3, 0)])
def test_experts_move_over_a_fast_network_only(bytes_per_second: float, moves: int) -> None:
    placed = SharedPlaced("mlp")
    each = rebalancer(placed, Speeds(bytes_per_second, 1.0, 1e9, 1.0), kind="mlp")
    each.count(np.array([[30, 30, 2, 2]]))
    assert (each.rebalance_if_due(64, None) is not None) == bool(moves)  # type: ignore[arg-type]
    assert len(placed.adopted) == moves
