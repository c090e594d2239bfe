"""What the doctor concludes from the facts of the ranks, without starting any."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sdit.distributed import fabric
from sdit.distributed.fabric import rounds_of_pairs
from sdit.doctor.checks import GIB, Check, Limits, as_table, check_attendance, check_facts, check_reach, exit_code_of
from sdit.doctor.rendezvous import peers_of
from sdit.errors import ExitCode
from sdit.planner import time_formulas

LIMITS = Limits(disk_bytes=GIB, shm_bytes=GIB / 16, clock_skew_seconds=1.0)


def facts_of(rank: int, **more: Any) -> dict[str, Any]:
    healthy = {
        "host": f"n{rank // 2}",
        "versions": {"sdit": "1", "python": "3.11", "torch": "2", "deepspeed": "0"},
        "cores": 8,
        "folder": "/runs",
        "disk_free_bytes": 10 * GIB,
        "folder_problem": "",
        "shm_free_bytes": GIB,
        "loopback_name": False,
        "clock_offset_seconds": 0.001 * rank,
    }
    return healthy | more


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_small_launches_measure_every_pair_alone(world: int) -> None:
    rounds = rounds_of_pairs(world)
    assert all(len(pairs) == 1 for pairs in rounds)
    assert len({pair for pairs in rounds for pair in pairs}) == world * (world - 1) // 2
    assert all(set(peers_of(rank, world)) == set(range(world)) - {rank} for rank in range(world))


@pytest.mark.parametrize("world", [17, 64, 100, 1024])
def test_large_launches_measure_few_pairs_and_leave_nobody_out(world: int) -> None:
    rounds = rounds_of_pairs(world)
    assert len(rounds) <= 10
    for pairs in rounds:
        members = [rank for pair in pairs for rank in pair]
        assert len(members) == len(set(members)) and all(0 <= a < b < world for a, b in pairs)
    assert {rank for pairs in rounds for pair in pairs for rank in pair} == set(range(world))
    assert all(0 < len(peers_of(rank, world)) <= 10 and rank not in peers_of(rank, world) for rank in range(world))


def test_pairs_use_the_communicator_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NCCL, `send` and `recv` would make a communicator for each of up to 120 pairs."""
    batches: list[list[tuple[str, int, int]]] = []
    backend = SimpleNamespace(
        isend="send", irecv="receive",
        P2POp=lambda transfer, box, other: (transfer, box.numel(), other),
        batch_isend_irecv=lambda operations: batches.append(operations) or [],
    )  # fmt: skip
    monkeypatch.setattr(fabric, "dist", backend)
    for rank, order in ((0, ["send", "receive"]), (3, ["receive", "send"])):
        batches.clear()
        comm = SimpleNamespace(rank=rank, device=torch.device("cpu"))
        assert fabric._ping(comm, (0, 3), size_bytes=8, times=2) > 0  # type: ignore[arg-type]
        assert batches == [[(way, 8, 3 - rank)] for way in order * 3]


def test_all_is_well() -> None:
    facts = {rank: facts_of(rank) for rank in range(4)}
    checks = [check_attendance(facts, 4, 60), *check_facts(facts, LIMITS)]
    assert exit_code_of(checks) == ExitCode.DONE
    assert "4 of 4 on 2 hosts: n0 (2), n1 (2)" in as_table(checks, facts, None)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"versions": {"torch": "3"}}, ExitCode.CONFIG, "rank 3 on n1 has torch 3, rank 0 on n0 has torch 2"),
        ({"disk_free_bytes": 5}, ExitCode.CONFIG, "/runs on n1 (rank 3) has"),
        ({"folder_problem": "Read-only file system"}, ExitCode.CONFIG, "cannot be written: Read-only file system"),
        ({"shm_free_bytes": 5}, ExitCode.CONFIG, "docker --shm-size"),
        ({"clock_offset_seconds": 90.0}, ExitCode.CRASH, "the clock of rank 3 on n1 is 90 s ahead of rank 0's"),
        ({"clock_offset_seconds": -90.0}, ExitCode.CRASH, "behind"),
    ],
)
def test_one_ill_rank_is_named(change: dict[str, Any], code: ExitCode, words: str) -> None:
    facts = {rank: facts_of(rank) for rank in range(4)}
    facts[3] |= change
    checks = check_facts(facts, LIMITS)
    assert exit_code_of(checks) == code
    assert [check for check in checks if check.problem and words in check.problem], checks


def test_missing_ranks_are_named_in_short() -> None:
    check = check_attendance({rank: facts_of(rank) for rank in (0, 2)}, 20, 60)
    assert "18 of 20 ranks did not come" in check.problem and "and 10 more" in check.problem
    assert check.exit_code == ExitCode.CRASH


def test_a_cut_connection_is_named_with_both_hosts() -> None:
    facts = {rank: facts_of(rank) for rank in range(4)}
    tried = {rank: [[peer, ""] for peer in peers_of(rank, 4)] for rank in range(4)}
    assert not check_reach(facts, tried, 4).problem
    tried[1][2] = [3, "10.0.0.3:4000 does not answer"]
    assert "rank 1 (n0) cannot reach rank 3 (n1): 10.0.0.3:4000" in check_reach(facts, tried, 4).problem
    del tried[2]
    assert "rank 2 left" in check_reach(facts, tried, 4).problem


def test_a_host_name_that_means_loopback_is_a_fault_on_several_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    one = {rank: facts_of(rank, loopback_name=True, host="n0") for rank in range(2)}
    two = {rank: facts_of(rank, loopback_name=True, host=f"n{rank}") for rank in range(2)}
    tried = {0: [[1, ""]], 1: [[0, ""]]}
    assert not check_reach(one, tried, 2).problem
    assert "GLOO_SOCKET_IFNAME" in check_reach(two, tried, 2).problem


def test_what_no_retry_mends_decides_the_exit_code() -> None:
    checks = [Check("a", "", "x", ExitCode.CRASH), Check("b", "", "y", ExitCode.CONFIG), Check("c", "")]
    assert exit_code_of(checks) == ExitCode.CONFIG
    assert exit_code_of(checks[2:]) == ExitCode.DONE


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_measured_link_is_the_one_that_the_planner_predicts_with(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that follow the planner's formulas give back their bytes per second and fixed seconds.

    The fixed time is measured with one number per rank, whose bytes take the last digits. It is that after other work, if
    this is longer.
    """
    rate, fixed, work_seconds = 1e9, 1e-3, 0.02
    formulas: dict[str, Callable[[float], float]] = {
        "all_to_all": lambda size: time_formulas.all_to_all_seconds(size * (ranks - 1) / ranks, 1, rate, fixed),
        "all_reduce": lambda size: time_formulas.all_reduce_seconds(size, ranks, rate, fixed),
        "all_gather": lambda size: time_formulas.all_gather_seconds(size, ranks, rate, fixed),
    }
    monkeypatch.setattr(fabric, "dist", SimpleNamespace(new_group=lambda members: members))
    monkeypatch.setattr(
        fabric, "_collective", lambda name, _group, _comm, count, n: (name, 4 * max(1, n // count) * count)
    )
    monkeypatch.setattr(fabric, "_turns", lambda *actions: actions)
    smallest = 2 * 4 * ranks / rate
    for wait in (0.0, 0.5, 3.0):  # of a collective after work, over its seconds without

        def seconds(_comm: object, work: Any, wait: float = wait) -> float:
            if work == (compute,):
                return fabric.TURNS * work_seconds
            if work[0] is compute:
                return fabric.TURNS * (work_seconds + wait * formulas[work[1][0]](work[1][1]))
            return formulas[work[0]](work[1])

        monkeypatch.setattr(fabric, "slowest_seconds", seconds)
        found = fabric.measure_link(SimpleNamespace(rank=1), [list(range(ranks))], compute)  # type: ignore[arg-type]
        for name in formulas:
            assert found[name][0] == pytest.approx(rate, rel=1e-4), name
            least = fixed * max(1.0, wait)
            assert least * (1 - 1e-9) <= found[name][1] <= least + max(1.0, wait) * smallest, name


def test_the_slowest_rank_counts_in_each_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks in turns are the slower one, as on a core that they share: each has a small median, and a step the large one."""
    mine, others = [9.0, 1.0, 3.0, 1.0], torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64)
    clock = iter([time for taken in mine for time in (0.0, taken)])
    monkeypatch.setattr(fabric, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    comm = SimpleNamespace(
        barrier=lambda: None, device=torch.device("cpu"), largest=lambda values: torch.maximum(values, others)
    )
    assert fabric.slowest_seconds(comm, lambda: None) == 3.0  # type: ignore[arg-type]


def compute() -> None:
    """Stand for the work before a collective."""


def test_collectives_of_a_link_run_on_one_rank() -> None:
    """The operations and their shapes are those that gloo takes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group, comm = dist.new_group([0]), SimpleNamespace(device=torch.device("cpu"))
        for name in ("all_to_all", "all_reduce", "all_gather"):
            fabric._collective(name, group, comm, 1, 12)()  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
