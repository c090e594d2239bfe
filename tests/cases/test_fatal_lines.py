"""The line that says why an attempt ended: one readable line, with the last step that anyone knows (row S14)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sdit.config import SuperviseConfig
from sdit.errors import ExitCode
from sdit.supervise.heartbeat import Heartbeat, Phase
from sdit.supervise.restart_policy import ExitReport, RestartPolicy
from tests.distributed.harness import ROOT
from tests.faults.ranks import eventually, newest_step, start_fake

GLOO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41213. "
    "This may be caused by another failure.\nException raised from readComplete at pair.cc:534 (most recent call first):\n"
    + "".join(
        f"frame #{number}: <unknown function> + 0x{number:x} (0x7f00 in libtorch_cpu.so)\n" for number in range(60)
    )
)


def text_of(*ends: ExitReport) -> str:
    return RestartPolicy(restarts=3, stop_code=75).decide({end.rank: end for end in ends}, "", stopping=False).text


def test_frozen_rank_is_named_without_what_it_said_when_it_was_woken() -> None:
    """S14: a frozen rank is woken for its stacks, and then finds the others gone: that is not why it is ended."""
    frozen = ExitReport(1, "n17", "stall", -9, Phase.STEP, 42, 99, frozen=True, secondary=True, text=GLOO)
    registry = ExitReport(0, "n17", "peer", -9, Phase.STEP, 42, 99)
    text = text_of(registry, frozen)
    assert text.startswith("rank 1, host n17, step 42, phase step: frozen: not even Python runs in it; next: ")


@pytest.mark.parametrize(
    "text",
    [GLOO, "word " * 2000, "x" * 9000, "two\nlines\r\n\tand \x1b[31mred\x1b[0m\x07\x00 \u2028 end", "\u202eeslaf " * 3],
    ids=["gloo", "long", "one word", "control characters", "direction progress"],
)
@pytest.mark.parametrize("cause", ["exit", "stall"])
def test_reason_is_one_short_printable_line(text: str, cause: str) -> None:
    """S14: texts of libraries are cut to a line that a person can read."""
    line = text_of(ExitReport(0, "n17", cause, 70, Phase.STEP, 42, 99, text=text))
    assert line.isprintable() and len(line) < 800
    assert "frame #" not in line and "step 42" in line


def test_rank_s_last_words_are_kept_whole_characters() -> None:
    """S14: a text that is longer than its place in shared memory is not cut within a character of a line."""
    pulse = Heartbeat()
    pulse.fail("\u00e4" * 9000, secondary=False)
    failure = pulse.failure()
    assert failure is not None
    line = text_of(ExitReport(0, "n17", "exit", 70, Phase.STEP, 42, 99, text=failure.text))
    assert "\ufffd" not in line


@pytest.mark.parametrize("number", [signal.SIGKILL, 40, 63])
def test_rank_killed_by_any_signal_is_named(number: int) -> None:
    """S14: real-time signals have no name in Python; the supervisor reports their number."""
    line = text_of(ExitReport(0, "n17", "exit", -number, Phase.STEP, 42, 99))
    assert "killed by SIGKILL" in line if number == signal.SIGKILL else f"killed by signal {number}" in line


class ThreeRanks(NamedTuple):
    """The coordinator of three ranks in their first attempt."""

    coordinator: Any
    store: Any


@pytest.fixture
def three_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ThreeRanks:
    from sdit.launch_environment import SINGLE, RankInfo
    from sdit.supervise.coordinator import Coordinator
    from sdit.supervise.job import Job, SupervisedRank
    from sdit.supervise.members import Member, MemberRegistry
    from sdit.supervise.rendezvous import RendezvousStore

    monkeypatch.setattr("sdit.supervise.coordinator.LOST_SECONDS", 0.0)
    (tmp_path / "logs").mkdir()
    token, registry = "a" * 32, MemberRegistry(tmp_path)
    store, members = (
        RendezvousStore(tmp_path, token),
        [Member(rank, f"{rank:032x}", f"n{rank}", 1, "digest") for rank in range(3)],
    )
    store.open()
    registry.open()
    for member in members[1:]:
        registry.post(member)
    job, info = Job([], tmp_path, "digest", lambda ranks: ranks, steps=100), RankInfo(0, 3, 0, 3, SINGLE)
    rank = SupervisedRank(job, SuperviseConfig(), info, {}, members[0])
    coordinator = Coordinator(rank, store, registry, tmp_path)
    eventually(lambda: coordinator.poll() or (store.attempt_spec() is not None and store.attempt_spec().attempt == 1))  # type: ignore[union-attr]
    return ThreeRanks(coordinator, store)


def test_lost_rank_is_reported_at_the_step_of_the_others(
    tmp_path: Path, three_ranks: ThreeRanks, capsys: pytest.CaptureFixture[str]
) -> None:
    """S14: a node is lost with its supervisor: the ranks that waited for it know how far it was."""
    coordinator, store = three_ranks
    store.report_exit(1, ExitReport(0, "n0", "stall", -9, Phase.STEP, 42, 99, secondary=True))
    store.report_exit(1, ExitReport(1, "n1", "peer", -9, Phase.STEP, 42, 99))
    coordinator.poll()
    time.sleep(0.01)
    coordinator.poll()
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("FATAL rank 2, host n2, step 42, phase step: its supervisor does not answer")
    (record,) = (json.loads(line) for line in (tmp_path / "logs" / "attempts.jsonl").read_text().splitlines())
    assert (record["rank"], record["cause"], record["step"]) == (2, "lost", 42)


def test_rank_0_is_not_lost_while_its_killed_worker_ends(three_ranks: ThreeRanks) -> None:
    """The supervisor of rank 0 is the coordinator's process. Its report comes when the kernel has ended the worker."""
    coordinator, store = three_ranks
    for rank in (1, 2):
        store.report_exit(1, ExitReport(rank, f"n{rank}", "stall", -9, Phase.STEP, 42, 99))
    for _ in range(3):
        coordinator.poll()
        time.sleep(0.01)
    assert store.attempt_spec().attempt == 1 and store.attempt_spec().code is None
    store.report_exit(1, ExitReport(0, "n0", "stall", -9, Phase.STEP, 42, 99))
    coordinator.poll()
    assert store.attempt_spec().attempt == 2 and store.attempt_spec().order == (0, 1, 2)


@pytest.mark.slow
def test_lost_supervisor_is_reported_with_its_step(tmp_path: Path) -> None:
    """S14: the same with real supervisors."""
    config = {"step_seconds": 2.5, "first_step_seconds": 2.5, "grace_seconds": 5.0}
    with start_fake(3, tmp_path / "run", steps=200, step_seconds=0.05, config=config) as ranks:
        eventually(lambda: newest_step(tmp_path / "run") >= 4)
        ranks.send(2, signal.SIGKILL)
        assert ranks.codes(seconds=90) == [ExitCode.CRASH, ExitCode.CRASH, -signal.SIGKILL]
    assert ranks.fatal[0].startswith("FATAL rank 2,") and ", step 0," not in ranks.fatal[0]


def test_unexpected_error_is_a_crash_that_a_scheduler_tries_again() -> None:
    code = "from sdit.cli.process import run_command; run_command(lambda: 1 // 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == ExitCode.CRASH
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr.splitlines()[-1]
