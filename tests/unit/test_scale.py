"""What a run costs on the shared file system and in messages, for 64 and 512 virtual ranks. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOW, HIGH, HEALTHY_SECONDS = 64, 512, 5.0
AFTER_START = (
    "logged step", "move of experts", "sample grid", "checkpoint, shards", "checkpoint, commit",
    "checkpoint, place in a node's file", "checkpoint, failed",
)  # fmt: skip
Phases = dict[tuple[str, int], dict]


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Phases:
    """The figures of the simulation by phase and number of ranks."""
    out = tmp_path_factory.mktemp("scale") / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--ranks", str(LOW), str(HIGH)]
    result = subprocess.run(
        [*command, "--seconds", str(HEALTHY_SECONDS), "--out", str(out)], capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "scale.json").read_text())
    assert (out / "scale.md").read_text().startswith("| phase |")
    return {(phase["name"], phase["ranks"]): phase for phase in found}


@pytest.mark.parametrize("ranks", [LOW, HIGH])
def test_a_healthy_run_uses_the_shared_file_system_little(phases: Phases, ranks: int) -> None:
    """The limits are those of 4,096 ranks. The nodes of 512 ranks already read as often as all nodes together may."""
    healthy = phases["healthy run", ranks]
    assert healthy["seconds"] == HEALTHY_SECONDS
    assert 0 < healthy["operations"] <= 1000 * HEALTHY_SECONDS
    assert healthy["read_bytes"] + healthy["written_bytes"] <= 1e6 * HEALTHY_SECONDS
    one_reader = 6 * HEALTHY_SECONDS / 0.5  # of each node, six operations each time
    assert healthy["operations"] <= ranks / 8 * one_reader + healthy["first_operations"]


@pytest.mark.parametrize("phase", ["start", "restart after a fault", "stop"])
def test_operations_of_a_rank_do_not_grow_with_the_ranks(phases: Phases, phase: str) -> None:
    low, high = phases[phase, LOW], phases[phase, HIGH]
    assert high["operations"] / HIGH <= 1.1 * low["operations"] / LOW
    assert high["most_operations"] <= 1.5 * low["most_operations"]


@pytest.mark.parametrize("phase", ["start", "restart after a fault", "stop"])
def test_rank_0_reads_each_announcement_and_report_once(phases: Phases, phase: str) -> None:
    """Rank 0 does work for each rank, but not for each pair of ranks."""
    low, high = phases[phase, LOW], phases[phase, HIGH]
    assert high["first_operations"] <= 1.1 * HIGH / LOW * low["first_operations"]


@pytest.mark.parametrize("phase", ["restart after a fault", "stop"])
def test_rank_0_reads_one_file_of_each_node_at_the_end_of_an_attempt(phases: Phases, phase: str) -> None:
    """An open, a read and a close: three operations."""
    more = phases[phase, HIGH]["first_operations"] - phases[phase, LOW]["first_operations"]
    assert more <= 3 * (HIGH - LOW) / 8


def test_the_messages_of_a_logged_step_do_not_grow_with_the_ranks(phases: Phases) -> None:
    """One sum, and eight bytes for the slowest rank."""
    low, high = phases["logged step", LOW], phases["logged step", HIGH]
    assert low["messages"] == high["messages"] == 2
    assert low["message_bytes"] == high["message_bytes"] < 8192


@pytest.mark.parametrize("phase", AFTER_START)
def test_what_a_rank_receives_after_the_start_does_not_grow_with_the_ranks(phases: Phases, phase: str) -> None:
    """Lists of all ranks are gathered at the start only. This is rank 0 or the last rank, whichever receives more."""
    low, high = phases[phase, LOW], phases[phase, HIGH]
    assert low["messages"] == high["messages"] > 0
    assert high["message_bytes"] <= low["message_bytes"] < 16384


def test_every_phase_is_of_the_start_or_after_it(phases: Phases) -> None:
    """A phase that is added to the simulation gets a limit of its messages."""
    with_messages = {name for (name, ranks), phase in phases.items() if phase["messages"]}
    assert with_messages == {*AFTER_START, "ranks start", "restore, same ranks", "restore, half the ranks"}


def test_a_commit_reads_one_file_of_each_node_and_no_shard(phases: Phases) -> None:
    """A stat, an open, a read, a close and an unlink for each node."""
    low, high = phases["checkpoint, commit", LOW], phases["checkpoint, commit", HIGH]
    assert high["operations"] - low["operations"] == 5 * (HIGH - LOW) / 8
    assert phases["checkpoint, shards", HIGH]["operations"] / HIGH <= 20
