"""Laws of ranks, expert groups and batch arithmetic."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest

from sdit.errors import ConfigError
from sdit.topology import (
    BatchPlan,
    ExpertGroups,
    choose_expert_parallel,
    legal_expert_sizes,
    plan_batch,
)

WORLDS = [1, 2, 6, 8, 12, 64, 1000]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("experts", [1, 3, 16, 64])
def test_legal_sizes_are_the_common_divisors(experts: int, world: int) -> None:
    legal = legal_expert_sizes(experts, world)
    assert legal == [size for size in range(1, world + 1) if experts % size == 0 and world % size == 0]
    assert all(choose_expert_parallel(size, experts, world, ranks_per_node=1) == size for size in legal)


@pytest.mark.parametrize(("experts", "nodes", "per_node"), [(16, 1, 8), (16, 4, 8), (3, 2, 8), (16, 2, 6), (6, 5, 4)])
def test_auto_is_the_largest_size_whose_groups_stay_inside_a_node(experts: int, nodes: int, per_node: int) -> None:
    world = nodes * per_node
    size = choose_expert_parallel("auto", experts, world, per_node)

    def inside(size: int) -> bool:
        groups = ExpertGroups(world, size)
        return all(len({peer // per_node for peer in groups.parallel_ranks(rank)}) == 1 for rank in range(world))

    assert inside(size)
    assert not any(inside(larger) for larger in legal_expert_sizes(experts, world) if larger > size)


def test_wrong_expert_size_names_value_and_legal_ones() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert: 3 .* legal: 1, 2, 4$"):
        choose_expert_parallel(3, experts=16, world=4, ranks_per_node=4)


@pytest.mark.parametrize(("world", "size"), [(1, 1), (4, 2), (8, 8), (512, 8), (1000, 4)])
def test_every_rank_is_in_one_group_of_each_kind_and_the_two_meet_in_it_alone(world: int, size: int) -> None:
    groups = ExpertGroups(world, size)
    for ranks_of, members in ((groups.parallel_ranks, size), (groups.data_ranks, groups.count)):
        parts = {tuple(ranks_of(rank)) for rank in range(world)}
        assert sorted(rank for part in parts for rank in part) == list(range(world))
        assert all(len(part) == members for part in parts)
    for rank in range(world):
        assert set(groups.parallel_ranks(rank)) & set(groups.data_ranks(rank)) == {rank}
        assert groups.parallel_ranks(rank)[groups.place_of(rank)] == rank


@pytest.mark.parametrize(("world", "size"), [(4, 2), (8, 4), (16, 2), (6, 3)])
def test_groups_are_those_that_deepspeed_creates(world: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_groups = pytest.importorskip("deepspeed.utils.groups")
    ours = ExpertGroups(world, size)
    monkeypatch.setattr(deepspeed_groups, "log_dist", lambda *args, **options: None)
    for rank in range(world):
        for kind in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
            monkeypatch.setattr(deepspeed_groups, kind, {})
            monkeypatch.setattr(deepspeed_groups, f"{kind}_RANKS", {})
        fake = SimpleNamespace(
            is_initialized=lambda: True,
            get_world_size=lambda: world,
            get_rank=lambda rank=rank: rank,
            new_group=tuple,
        )
        monkeypatch.setattr(deepspeed_groups, "dist", fake)
        deepspeed_groups._create_expert_and_data_parallel(size)
        name = f"ep_size_{size}"
        assert deepspeed_groups._EXPERT_PARALLEL_GROUP[name] == tuple(ours.parallel_ranks(rank))
        assert deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] == tuple(ours.data_ranks(rank))


@pytest.mark.parametrize("world", [1, 3, 8, 256])
@pytest.mark.parametrize("per_rank", [1, 6, 32])
def test_a_batch_is_ranks_times_micro_batch_times_accumulation(world: int, per_rank: int) -> None:
    assert plan_batch(world * per_rank, None, world) == BatchPlan(world * per_rank, per_rank, 1)
    for micro in range(1, per_rank + 1):
        if per_rank % micro == 0:
            plan = plan_batch(world * per_rank, micro, world)
            assert math.prod((world, plan.micro_batch, plan.accumulation)) == plan.global_batch
            assert plan.chunk == world * micro


@pytest.mark.parametrize(("batch", "micro", "world"), [(100, None, 8), (3, None, 8), (64, 5, 8), (64, 16, 8)])
def test_an_impossible_batch_names_only_values_that_work(batch: int, micro: int | None, world: int) -> None:
    with pytest.raises(ConfigError, match=r"^train\.(global|micro)_batch: \d+ .*legal: [\d, ]+$") as error:
        plan_batch(batch, micro, world)
    named = [int(value) for value in re.split(r"legal: ", str(error.value))[1].split(", ")]
    assert named
    for value in named:
        plan_batch(value, None, world) if batch % world else plan_batch(batch, value, world)
