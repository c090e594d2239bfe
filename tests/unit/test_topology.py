"""Laws of ranks, expert groups and batch arithmetic."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest

from sdit.errors import ConfigError
from sdit.launch_environment import LAUNCHER_VARIABLE, SINGLE, RankInfo, find_rank, tasks_per_node
from sdit.topology import (
    BatchPlan,
    ExpertGroups,
    choose_expert_parallel,
    common_ranks_per_node,
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


@pytest.mark.parametrize("nodes", [(2, 2, 2, 2), (4, 2, 2), (2, 2, 2, 1), (6, 4), (8,), (3, 6, 3)])
def test_groups_of_the_common_size_are_the_largest_that_stay_inside_uneven_nodes(nodes: tuple[int, ...]) -> None:
    """Every rank computes the same size, from the sizes of all nodes."""
    node_of = [node for node, ranks in enumerate(nodes) for _ in range(ranks)]
    common = common_ranks_per_node([nodes[node] for node in node_of])

    def inside(size: int) -> bool:
        return all(len(set(node_of[start : start + size])) == 1 for start in range(0, len(node_of), size))

    assert [size for size in range(1, len(node_of) + 1) if len(node_of) % size == 0 and inside(size)][-1] == common


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
        assert groups.parallel_ranks(rank)[groups.ep_rank_of(rank)] == rank


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


def placed(world: int, per_node: int) -> list[tuple[int, int, int]]:
    """(rank, node, local rank) of every rank of full nodes."""
    return [(rank, rank // per_node, rank % per_node) for rank in range(world)]


def torchrun(world: int, per_node: int) -> list[dict[str, object]]:
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": per_node, "TORCHELASTIC_RUN_ID": "none"}
    return [
        {**common, "RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
        for rank, node, local in placed(world, per_node)
    ]


def deepspeed(world: int, per_node: int) -> list[dict[str, object]]:
    common = {"WORLD_SIZE": world, "LOCAL_SIZE": per_node, "CROSS_SIZE": world // per_node}
    return [
        {**common, "RANK": rank, "LOCAL_RANK": local, "CROSS_RANK": node}
        for rank, node, local in placed(world, per_node)
    ]


def slurm(world: int, per_node: int) -> list[dict[str, object]]:
    layout = f"{per_node}(x{world // per_node})"
    common = {
        "SLURM_STEP_ID": 0,
        "SLURM_STEP_NUM_TASKS": world,
        "SLURM_NTASKS": world,
        "SLURM_STEP_TASKS_PER_NODE": layout,
    }
    return [
        {**common, "SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local}
        for rank, node, local in placed(world, per_node)
    ]


def open_mpi(world: int, per_node: int) -> list[dict[str, object]]:
    name = "OMPI_COMM_WORLD_"
    common = {f"{name}SIZE": world, f"{name}LOCAL_SIZE": per_node, "PMIX_RANK": 0}
    return [{**common, f"{name}RANK": rank, f"{name}LOCAL_RANK": local} for rank, _, local in placed(world, per_node)]


def mpich(world: int, per_node: int) -> list[dict[str, object]]:
    common = {"PMI_SIZE": world, "MPI_LOCALNRANKS": per_node}
    return [{**common, "PMI_RANK": rank, "MPI_LOCALRANKID": local} for rank, _, local in placed(world, per_node)]


def kubernetes(world: int, per_node: int) -> list[dict[str, object]]:
    common = {
        "NNODES": world // per_node,
        "RANKS_PER_NODE": per_node,
        "MASTER_ADDR": "sdit-0.sdit",
        "MASTER_PORT": 29500,
    }
    return [{**common, "JOB_COMPLETION_INDEX": node, "LOCAL_RANK": local} for _, node, local in placed(world, per_node)]


LAUNCHERS = {
    "torchrun": torchrun, "deepspeed": deepspeed, "SLURM": slurm, "Open MPI": open_mpi, "MPICH or Intel MPI": mpich,
    "Kubernetes": kubernetes,
}  # fmt: skip


def found(*variables: dict[str, object]) -> RankInfo:
    """What is found where launchers are nested, the outer one first."""
    return find_rank({name: str(value) for outer in variables for name, value in outer.items()})


@pytest.mark.parametrize("source", LAUNCHERS)
@pytest.mark.parametrize(("world", "per_node"), [(1, 1), (4, 1), (4, 4), (8, 4)])
def test_every_rank_finds_its_place_from_the_launcher_s_variables(source: str, world: int, per_node: int) -> None:
    ranks = [found(variables) for variables in LAUNCHERS[source](world, per_node)]
    assert ranks == [RankInfo(rank, world, local, per_node, source) for rank, _, local in placed(world, per_node)]


@pytest.mark.parametrize("inner", ["torchrun", "deepspeed", "Open MPI"])
@pytest.mark.parametrize("outer", ["SLURM", "Kubernetes"])
def test_the_innermost_of_nested_launchers_holds(inner: str, outer: str) -> None:
    for node, agent in enumerate(LAUNCHERS[outer](2, 1)):
        for local in range(4):
            rank = 4 * node + local
            assert found(agent, LAUNCHERS[inner](8, 4)[rank]) == RankInfo(rank, 8, local, 4, inner)


def test_pmi_variables_that_srun_sets_as_well_leave_the_node_to_slurm() -> None:
    for rank, task in enumerate(slurm(4, 2)):
        assert found(task, {"PMI_RANK": rank, "PMI_SIZE": 4}) == RankInfo(rank, 4, rank % 2, 2, "SLURM")


def test_uneven_nodes_of_slurm() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    step = {**slurm(8, 4)[0], "SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_STEP_NUM_TASKS": 5}
    assert found({**step, "SLURM_PROCID": 4, "SLURM_NODEID": 1, "SLURM_LOCALID": 1}) == RankInfo(4, 5, 1, 2, "SLURM")


def test_without_a_launcher_there_is_one_process_also_inside_an_allocation() -> None:
    allocation = {name: value for name, value in slurm(8, 4)[3].items() if name != "SLURM_STEP_ID"}
    assert found() == found(allocation) == RankInfo(0, 1, 0, 1, SINGLE)


def test_a_supervised_rank_names_who_launched_its_supervisor() -> None:
    ours = {"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, LAUNCHER_VARIABLE: "SLURM"}
    # Three of four ranks are left after the loss of one: no contradiction to what srun had started.
    assert found(slurm(4, 2)[1], ours) == RankInfo(1, 3, 1, 2, "SLURM")


CONTRADICTIONS = {
    "left over in the shell": (slurm(4, 1)[3], {"RANK": 0, "WORLD_SIZE": 1}),
    "a launch inside one that is larger": (slurm(4, 1)[3], open_mpi(2, 2)[0]),
    "as many by hand, but another": (slurm(4, 1)[3], {"RANK": 0, "WORLD_SIZE": 4}),
}
INCOMPLETE = [
    ({"WORLD_SIZE": 4}, "RANK: is not set"),
    ({"RANK": 1}, "WORLD_SIZE: is not set"),
    ({"PMI_RANK": 1}, "PMI_SIZE: is not set"),
    ({"JOB_COMPLETION_INDEX": 1}, "NNODES: is not set"),
    ({"JOB_COMPLETION_INDEX": 1, "NNODES": 2, "RANKS_PER_NODE": 4}, "LOCAL_RANK: is not set"),
    ({"SLURM_PROCID": 1, "SLURM_STEP_ID": 0, "SLURM_NTASKS": "-4"}, "SLURM_NTASKS: '-4' is not legal"),
    ({"RANK": 4, "WORLD_SIZE": 4}, "ranks: RANK=4, WORLD_SIZE=4"),
    ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1}, "ranks: RANK=1, WORLD_SIZE=4"),
    ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 2}, "ranks: RANK=1, WORLD_SIZE=4"),
]


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_variables_of_two_launches_are_refused_and_both_are_named(case: str) -> None:
    outer, inner = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=r"^ranks: \w+=0, .* and SLURM_PROCID=3, .* contradict .*; legal: unset"):
        found(outer, inner)


@pytest.mark.parametrize(("variables", "text"), INCOMPLETE)
def test_incomplete_or_impossible_variables_are_refused_by_name(variables: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(text)}.*; legal: "):
        found(variables)
