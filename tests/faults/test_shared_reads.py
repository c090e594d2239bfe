"""Supervisors of one node share what one of them reads, also while one is killed or stopped in its read. Ranks are fakes."""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sdit.errors import ExitCode
from sdit.supervise.coordinator import LOST_SECONDS
from sdit.supervise.read_schedule import STORE_SECONDS
from tests.distributed.harness import rank_environments
from tests.faults.ranks import Ranks, eventually, newest_step
from tests.faults.test_supervision import QUICK, attempts

WORLD, PER_NODE, NODE = 6, 3, 1  # two nodes; the other one has the coordinator
ON_NODE = {3, 4, 5}
READS = 6
PROGRAM = Path(__file__).with_name("shared_reads.py")


class TwoNodes(Ranks):
    """Six supervised fake ranks on two virtual nodes of three."""

    def __init__(self, run_dir: Path, strike: int | None = None, **config: object) -> None:
        self._folder = run_dir.with_name("reads")
        for folder in (run_dir, self._folder):
            folder.mkdir()
        reads = {
            "folder": str(self._folder),
            "ranks_per_node": PER_NODE,
            "strike": strike,
            "node": NODE,
        }
        options = {"config": config, "step_seconds": 0.05, "reads": reads}
        command = [sys.executable, str(PROGRAM), str(run_dir), "10000", json.dumps(options)]
        environments = [
            {**values, "LOCAL_RANK": str(rank % PER_NODE), "LOCAL_SIZE": str(PER_NODE)}
            for rank, values in enumerate(rank_environments(WORLD))
        ]
        super().__init__(WORLD, command, run_dir.with_suffix(".log"), environments=environments)

    @property
    def reads(self) -> list[tuple[int, float]]:
        """The reads of the node's supervisors: rank and time, in the order in which they began."""
        lines = (self._folder / f"node-{NODE}.reads").read_text().splitlines()
        return [(int(rank), float(at)) for rank, at in map(str.split, lines)]

    @property
    def struck(self) -> int:
        """The rank whose supervisor was struck while it read. It waits for that."""
        return int(eventually((self._folder / "struck").read_text))

    def await_reads(self, ranks: set[int], since: int) -> None:
        """Wait until some of `ranks` have read `READS` times after the first `since` reads."""
        eventually(lambda: sum(rank in ranks for rank, _ in self.reads[since:]) >= READS)

    def lives(self, rank: int) -> bool:
        return self.processes[rank].poll() is None


def test_supervisors_of_a_node_read_about_as_often_as_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with TwoNodes(run) as ranks:
        eventually(lambda: newest_step(run) >= 4)
        since = len(ranks.reads)
        ranks.await_reads(ON_NODE, since + READS)
        times = [at for _, at in ranks.reads[since:]]
        apart = 1 + sum(later - earlier > STORE_SECONDS / 2 for earlier, later in pairwise(times))
        # Two may find the copy too old at the same instant. Three supervisors that do not share would read three times.
        assert len(times) <= 2 * apart and apart <= (times[-1] - times[0]) / STORE_SECONDS + 2
        ranks.send(4, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * WORLD
    assert ranks.fatal == []


def test_another_supervisor_reads_while_the_reader_is_stopped(tmp_path: Path) -> None:
    """Its worker continues, and so does the run. When the parent continues, it follows the launch to its end."""
    run = tmp_path / "run"
    with TwoNodes(run, signal.SIGSTOP) as ranks:
        struck = ranks.struck
        since, step = len(ranks.reads), newest_step(run)
        ranks.await_reads(ON_NODE - {struck}, since)
        eventually(lambda: newest_step(run) >= step + 4)
        assert struck in ON_NODE and all(map(ranks.lives, range(WORLD)))
        (other, *_) = sorted(ON_NODE - {struck})
        ranks.send(other, signal.SIGTERM)
        eventually(lambda: len(list((run / "supervise").glob("*/end-0001/*.json"))) == WORLD - 1)
        os.kill(ranks.processes[struck].pid, signal.SIGCONT)
        assert ranks.codes() == [ExitCode.REQUEUE] * WORLD
    assert ranks.fatal == [] and [record["cause"] for record in attempts(run)] == ["exit"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_that_is_lost_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    """The others of its node read, end the attempt, and continue without it; a parent that stays stopped counts as lost."""
    run = tmp_path / "run"
    with TwoNodes(run, number, elastic=True, **QUICK) as ranks:
        struck = ranks.struck
        if number == signal.SIGSTOP:  # as if the whole node stood still
            os.kill(ranks.child_pid(struck), signal.SIGSTOP)
        since = len(ranks.reads)
        ranks.await_reads(ON_NODE - {struck}, since)
        eventually(lambda: len(attempts(run)) == 1, seconds=LOST_SECONDS + 60)
        step = newest_step(run)
        eventually(lambda: newest_step(run) >= step + 8)
        left = [rank for rank in range(WORLD) if rank != struck]
        ranks.send(left[-1], signal.SIGTERM)
        assert [ranks.processes[rank].wait(60) for rank in left] == [ExitCode.REQUEUE] * len(left)
    assert f"rank {struck}," in ranks.fatal[0] and "does not answer" in ranks.fatal[0]
    assert [record["ranks"] for record in attempts(run)] == [WORLD, WORLD - 1]


@pytest.mark.slow
def test_a_kill_of_the_reader_does_not_hide_the_end_of_the_run(tmp_path: Path) -> None:
    """Without `elastic` the loss ends the run: all others exit with the same code."""
    with TwoNodes(tmp_path / "run", signal.SIGKILL, **QUICK) as ranks:
        struck = ranks.struck
        codes = ranks.codes(seconds=LOST_SECONDS + 60)
    assert codes == [-signal.SIGKILL if rank == struck else ExitCode.CRASH for rank in range(WORLD)]
    assert struck in ON_NODE and f"rank {struck}," in ranks.fatal[0] and "does not answer" in ranks.fatal[0]
