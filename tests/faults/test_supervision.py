"""Laws of supervision, shown with real processes whose ranks are fakes (no torch): each takes a second or three."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdit.errors import ExitCode
from sdit.supervise.coordinator import LOST_SECONDS
from sdit.supervise.endpoint import free_port
from sdit.supervise.log_files import log_path, mark_lines
from tests.distributed.harness import ROOT
from tests.faults.ranks import FAKE, eventually, is_gone, newest_step, start_fake

QUICK = {"step_seconds": 2.5, "first_step_seconds": 2.5, "grace_seconds": 5.0}
STEPS = 12


def attempts(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "logs" / "attempts.jsonl").read_text().splitlines()]


def stacks_of(run_dir: Path, rank: int) -> str:
    """The stack dumps of a rank. The file of a node has those of all its ranks but rank 0."""
    mark = mark_lines("\n", rank).rstrip("\n")
    lines = log_path(run_dir / "logs", rank, "stacks").read_text().splitlines()
    return "\n".join(line.removeprefix(mark) for line in lines if line.startswith(mark))


def test_undisturbed_run_ends_with_zero_and_says_nothing(tmp_path: Path) -> None:
    with start_fake(3, tmp_path / "run") as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 3
    assert ranks.output == "" and newest_step(tmp_path / "run") == STEPS
    assert not (tmp_path / "run" / "lock.json").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_killed_rank_is_named_and_the_run_goes_on_from_the_newest_checkpoint(tmp_path: Path, rank: int) -> None:
    with start_fake(3, tmp_path / "run", faults=[f"kill@{rank}:6"]) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 3
    (line,) = ranks.fatal
    assert f"rank {rank}, host {socket.gethostname()}, step 6, phase step: killed by SIGKILL" in line
    assert "restart 1 of 3 from images-000000000004" in line
    assert [record["cause"] for record in attempts(tmp_path / "run")] == ["exit", "exit"]
    assert newest_step(tmp_path / "run") == STEPS


@pytest.mark.parametrize(("kind", "word"), [("stop", "frozen"), ("gil", "frozen"), ("hang", "no progress")])
def test_stalled_rank_is_told_from_those_that_wait_for_it(tmp_path: Path, kind: str, word: str) -> None:
    with start_fake(3, tmp_path / "run", faults=[f"{kind}@1:6"], config=QUICK) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 3
    (line,) = ranks.fatal
    assert "rank 1," in line and word in line, line
    for rank in range(3):
        stacks = stacks_of(tmp_path / "run", rank)
        assert "attempt 1, step 6" in stacks and "fake_rank.py" in stacks, stacks


def test_sigterm_on_one_rank_makes_all_save_one_step_and_ask_for_a_requeue(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", steps=10_000, step_seconds=0.02) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2
    assert ranks.fatal == []
    with start_fake(2, tmp_path / "run", steps=newest_step(tmp_path / "run") + 2) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2


def test_exit_code_after_a_stop_is_zero_on_request(tmp_path: Path) -> None:
    with start_fake(1, tmp_path / "run", steps=10_000, config={"stop_code": 0}) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        ranks.send(0, signal.SIGUSR1)
        assert ranks.codes() == [ExitCode.DONE]


def test_second_signal_is_obeyed_at_once(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", faults=["hang@0:6"]) as ranks:
        eventually((tmp_path / "run" / "struck").exists)
        children = [ranks.child_pid(rank) for rank in range(2)]
        ranks.send(1, signal.SIGINT)
        time.sleep(0.5)
        assert all(process.poll() is None for process in ranks.processes)
        ranks.send(1, signal.SIGINT)
        assert ranks.codes(seconds=10) == [ExitCode.CRASH] * 2
    assert all(map(is_gone, children)) and newest_step(tmp_path / "run") == 4
    assert "a stop was requested" in ranks.fatal[0]


def test_rank_that_does_not_stop_within_its_grace_is_ended(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", faults=["hang@0:6"], config={"grace_seconds": 1.0}) as ranks:
        eventually((tmp_path / "run" / "struck").exists)
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes(seconds=15) == [ExitCode.CRASH] * 2


def test_restarts_without_a_newer_checkpoint_are_bounded(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", faults=["kill@1:6!"], config={"restarts": 2}) as ranks:
        assert ranks.codes() == [ExitCode.CRASH] * 2
    assert len(ranks.fatal) == 3 and "2 restarts made" in ranks.fatal[-1]


def test_crash_loop_with_one_error_is_not_retried_by_the_scheduler(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", faults=["exception@1:6!"], config={"restarts": 2}) as ranks:
        assert ranks.codes() == [ExitCode.DATA] * 2
    assert "the same error each time" in ranks.fatal[-1]


def test_newer_checkpoints_renew_the_restarts(tmp_path: Path) -> None:
    faults = ["kill@1:1", "kill@1:5!", "kill@0:9!"]  # attempt 1 stops at 1, 2 at 5 (checkpoint 4), 3 at 5 again: over
    with start_fake(2, tmp_path / "run", faults=faults, config={"restarts": 1}) as ranks:
        assert ranks.codes() == [ExitCode.CRASH] * 2
    assert [record["step"] for record in attempts(tmp_path / "run")] == [1, 5, 5]


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.IO])
def test_errors_that_would_come_again_end_the_run_on_all_ranks(tmp_path: Path, code: int) -> None:
    with start_fake(2, tmp_path / "run", faults=[f"{code}@1:6"]) as ranks:
        assert ranks.codes() == [code] * 2
    assert len(ranks.fatal) == 1 and len(attempts(tmp_path / "run")) == 1


def test_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    with start_fake(4, tmp_path / "run", only=(0, 1, 3), config={"start_seconds": 2.0}) as ranks:
        assert ranks.codes() == [ExitCode.CRASH] * 3
    assert ranks.fatal[0].startswith("FATAL rank 2 of 4 did not start within 2.0 s")


def test_rank_with_another_config_is_named(tmp_path: Path) -> None:
    with start_fake(3, tmp_path / "run", digests={"1": "other"}) as ranks:
        assert ranks.codes() == [ExitCode.CONFIG] * 3
    assert "rank 1," in ranks.fatal[0] and "another config" in ranks.fatal[0]


def test_second_launch_on_a_run_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start_fake(2, run, steps=10_000, step_seconds=0.05) as first:
        eventually(lambda: newest_step(run) >= 4)
        with start_fake(2, run, steps=60) as second:
            assert second.codes() == [ExitCode.CONFIG] * 2
        holder = f"in use by process {first.processes[0].pid} on host {socket.gethostname()}"
        assert holder in second.output
        before = newest_step(run)
        eventually(lambda: newest_step(run) > before)
        first.send(0, signal.SIGTERM)
        assert first.codes() == [ExitCode.REQUEUE] * 2


def test_killed_supervisor_leaves_no_orphan_and_its_lock_is_taken_over(tmp_path: Path) -> None:
    with start_fake(1, tmp_path / "run", steps=10_000) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        child = ranks.child_pid(0)
        ranks.send(0, signal.SIGKILL)
        eventually(lambda: is_gone(child), seconds=5)
    with start_fake(1, tmp_path / "run", steps=newest_step(tmp_path / "run") + 1) as ranks:
        assert ranks.codes() == [ExitCode.DONE]
    assert "took over the lock of process" in ranks.output


def test_ranks_save_and_leave_when_their_launcher_is_killed(tmp_path: Path) -> None:
    """As `deepspeed` leaves its ranks behind when it is killed; the launcher here is a small Python program."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, str(FAKE), str(run), "100000", "{}"]
    code = f"""
import subprocess, time
from tests.distributed.harness import rank_environments
ranks = [subprocess.Popen({command!r}, env=e) for e in rank_environments(2)]
print(*[rank.pid for rank in ranks], flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert launcher.stdout is not None
        pids = [int(word) for word in launcher.stdout.readline().split()]
        eventually(lambda: newest_step(run) >= 4)
    finally:
        launcher.kill()
        launcher.wait()
    eventually(lambda: all(map(is_gone, pids)), seconds=15)
    assert attempts(run)[-1]["code"] == ExitCode.REQUEUE


def test_suspended_machine_accuses_nobody(tmp_path: Path) -> None:
    """As a laptop's lid or a scheduler's suspension does it: supervisor and rank stand still beyond every deadline."""
    config = {"step_seconds": 2.5, "first_step_seconds": 2.5, "restarts": 0}
    with start_fake(1, tmp_path / "run", steps=150, step_seconds=0.02, config=config) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        supervisor, child = ranks.processes[0].pid, ranks.child_pid(0)
        os.kill(child, signal.SIGSTOP)
        time.sleep(0.4)  # the supervisor sees it stand still, then does so itself
        os.kill(supervisor, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(supervisor, signal.SIGCONT)
        time.sleep(0.3)  # it looks before the rank runs again
        os.kill(child, signal.SIGCONT)
        assert ranks.codes() == [ExitCode.DONE]
    assert ranks.fatal == []


def test_port_that_is_taken_is_replaced_by_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


@pytest.mark.slow
@pytest.mark.parametrize(("elastic", "code"), [(True, ExitCode.DONE), (False, ExitCode.CRASH)])
def test_lost_node_ends_the_run_or_is_left_behind(tmp_path: Path, elastic: bool, code: int) -> None:
    with start_fake(3, tmp_path / "run", steps=200, step_seconds=0.05, config={**QUICK, "elastic": elastic}) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        ranks.send(2, signal.SIGKILL)
        assert ranks.codes(seconds=LOST_SECONDS + 60) == [code, code, -signal.SIGKILL]
    assert "rank 2," in ranks.fatal[0] and "does not answer" in ranks.fatal[0]


def test_supervisor_that_is_lost_after_its_worker_had_ended_is_not_awaited_for_ever(tmp_path: Path) -> None:
    """All workers end with 0, but rank 1's supervisor is killed before it reports that."""
    run, lost_seconds = tmp_path / "run", 8.0
    with start_fake(2, run, steps=40, step_seconds=0.05, config=QUICK, lost_seconds=lost_seconds) as ranks:
        eventually(lambda: newest_step(run) >= 4)
        ranks.send(1, signal.SIGSTOP)
        eventually(lambda: newest_step(run) == 40)
        eventually(lambda: list((run / "supervise").glob("*/end-0001/00000.json")))
        ranks.send(1, signal.SIGKILL)
        assert ranks.codes(seconds=lost_seconds + 40) == [ExitCode.CRASH, -signal.SIGKILL]
    assert "rank 1," in ranks.fatal[0] and "does not answer" in ranks.fatal[0]


def test_replaced_leader_leads_the_others_on(tmp_path: Path) -> None:
    """Rank 0's pod is lost and replaced within seconds; rank 1's supervisor, whose child is lost as well, lives on."""
    run = tmp_path / "run"
    with start_fake(2, run, steps=10_000, step_seconds=0.02) as ranks:
        eventually(lambda: newest_step(run) >= 4)
        child = ranks.child_pid(1)
        ranks.send(0, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        ranks.replace(0)
        at = newest_step(run)
        eventually(lambda: newest_step(run) >= at + 8, seconds=LOST_SECONDS)
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2


@pytest.mark.slow
def test_lost_leader_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    with start_fake(2, tmp_path / "run", steps=10_000) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        child = ranks.child_pid(1)
        ranks.send(0, signal.SIGKILL)
        assert ranks.codes(seconds=LOST_SECONDS + 30) == [-signal.SIGKILL, ExitCode.CRASH]
    assert is_gone(child) and "rank 0's supervisor does not answer" in ranks.fatal[0]
