"""Which placement of token-routed experts their measured loads repay."""

from __future__ import annotations

import numpy as np
import pytest

from sdit.config import ModelConfig, MoeConfig, ParallelConfig
from sdit.expert_parallel.placement import ExpertPlacement, expected_load_imbalance
from sdit.expert_parallel.rebalance import TokenRebalancer, even_placement
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


def rebalancer(**moe: object) -> TokenRebalancer:
    config = MoeConfig.model_validate({"experts": 4, "top_k": 2, **moe})
    model = ModelConfig(variant="dit", depth=1, width=16, heads=2, patch_size=4, input_size=8, channels=1, moe=config)
    return TokenRebalancer(model, ParallelConfig(placement_refresh_images=64), BatchPlan(32, 32, 1), Placed(), 4)  # type: ignore[arg-type]


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
