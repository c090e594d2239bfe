"""SIGHUP, as a lost ssh connection sends it: the run saves, stops and leaves with 75 (row R13)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdit.checkpoint.find import find_checkpoint
from sdit.errors import ExitCode
from sdit.observe.metrics_file import read_metrics
from tests.distributed.harness import ROOT, rank_environments
from tests.faults.ranks import FAKE, WAIT_SECONDS, Ranks, eventually, is_gone, newest_step, start_fake, start_real

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
ENDLESS = ("train.steps=1000000", "checkpoint.every_steps=20")
PYTHON = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ("deepspeed", "--num_gpus", "2", "--master_port"),
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--master-port"),
}


def last_attempt(run: Path) -> dict:
    return json.loads((run / "logs" / "attempts.jsonl").read_text().splitlines()[-1])


def send(pid: int, *numbers: signal.Signals, pause_seconds: float = 0.4) -> None:
    for number in numbers:
        os.kill(pid, number)
        time.sleep(pause_seconds)


def test_hangup_saves_stops_and_says_so(tmp_path: Path) -> None:
    """R13: SIGHUP at one of two ranks: all save the same step, and one line names the rank and the signal."""
    run = tmp_path / "run"
    with start_real(2, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        ranks.send(1, signal.SIGHUP)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2
    assert find_checkpoint(run).manifest["clock"]["steps"] == read_metrics(run)[-1]["step"]
    (line,) = [line for line in ranks.output.splitlines() if "SIGHUP" in line]
    assert line.startswith("stopping at step ") and "rank 1: SIGHUP" in line
    assert line in (run / "logs" / "rank-000.log").read_text()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGHUP, signal.SIGHUP, signal.SIGHUP),
        (signal.SIGHUP, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGHUP),
        (signal.SIGHUP, signal.SIGINT, signal.SIGHUP),
    ],
    ids=lambda numbers: "+".join(number.name for number in numbers),
)
@pytest.mark.parametrize("where", ["supervisor", "rank"])
def test_hangup_is_never_the_signal_that_ends_a_run_at_once(
    tmp_path: Path, numbers: tuple[signal.Signals, ...], where: str
) -> None:
    """R13: the kernel, the shell and the launcher each send a signal of their own while the run saves."""
    run = tmp_path / "run"
    slow = {"step_seconds": 3.0} if where == "supervisor" else {"step_seconds": 0.02}
    with start_fake(1, run, steps=100_000, **slow) as ranks:
        eventually(lambda: (run / "barriers").exists())
        pid = ranks.processes[0].pid if where == "supervisor" else ranks.child_pid(0)
        send(pid, *numbers)
        if where == "rank":  # a fake rank leaves signals to its supervisor
            assert ranks.processes[0].poll() is None
            ranks.send(0, signal.SIGHUP)
        assert ranks.codes() == [ExitCode.REQUEUE]
    assert ranks.fatal == []


def test_second_signal_after_a_hangup_is_obeyed_at_once(tmp_path: Path) -> None:
    """R13: a person who wants the run gone still gets it with two signals of another kind."""
    run = tmp_path / "run"
    with start_fake(1, run, faults=["hang@0:6"]) as ranks:
        eventually((run / "struck").exists)
        send(ranks.processes[0].pid, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM)
        assert ranks.codes(seconds=10) == [ExitCode.CRASH]


def test_hangup_at_a_rank_itself_stops_the_run(tmp_path: Path) -> None:
    """R13: SIGHUP, twice, at the real rank instead of its supervisor, as `pkill -HUP -f train.py` sends it."""
    run = tmp_path / "run"
    with start_real(1, run, TINY, *ENDLESS) as ranks:
        eventually(lambda: newest_step(run) > 0)
        send(ranks.child_pid(0), signal.SIGHUP, signal.SIGHUP, pause_seconds=0.01)
        assert ranks.codes() == [ExitCode.REQUEUE]
    assert find_checkpoint(run).manifest["clock"]["steps"] == read_metrics(run)[-1]["step"]


def test_run_without_a_supervisor_saves_on_a_hangup(tmp_path: Path) -> None:
    """R13: `supervise.enabled=false`."""
    run = tmp_path / "run"
    with start_real(1, run, TINY, *ENDLESS, "supervise.enabled=false") as ranks:
        eventually(lambda: newest_step(run) > 0)
        send(ranks.processes[0].pid, signal.SIGHUP, signal.SIGHUP, pause_seconds=0.01)
        assert ranks.codes() == [ExitCode.REQUEUE]
    assert find_checkpoint(run).manifest["clock"]["steps"] == read_metrics(run)[-1]["step"]


@pytest.mark.parametrize("supervised", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_run_started_by_nohup_ignores_a_hangup(tmp_path: Path, supervised: str) -> None:
    """R13: `nohup train ...`: SIGHUP at all of its processes changes nothing; SIGTERM still stops it."""
    run = tmp_path / "run"
    command = ["nohup", sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(TINY)]
    command += ["--run-dir", str(run), *ENDLESS, f"supervise.enabled={supervised}"]
    with Ranks(1, command, tmp_path / "log") as ranks:
        eventually(lambda: newest_step(run) > 0)
        pids = [ranks.processes[0].pid] + ([ranks.child_pid(0)] if supervised == "true" else [])
        for pid in pids:
            send(pid, signal.SIGHUP, signal.SIGHUP, pause_seconds=0.01)
        at = newest_step(run)
        eventually(lambda: newest_step(run) > at)
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE]


def test_lost_terminal_takes_the_launcher_but_not_the_state(tmp_path: Path) -> None:
    """R13: SIGHUP at the whole process group: the launcher dies of it, and both together are one request to stop."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, str(FAKE), str(run), "100000", json.dumps({"step_seconds": 1.0})]
    code = f"""
import subprocess, time
from tests.distributed.harness import rank_environments
ranks = [subprocess.Popen({command!r}, env=e) for e in rank_environments(2)]
print(*[rank.pid for rank in ranks], flush=True)
time.sleep(600)
"""
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        assert launcher.stdout is not None
        pids = [int(word) for word in launcher.stdout.readline().split()]
        eventually(lambda: list((run / "barriers").iterdir()))
        os.killpg(launcher.pid, signal.SIGHUP)
        assert launcher.wait(10) == -signal.SIGHUP
    finally:
        launcher.kill()
    eventually(lambda: all(map(is_gone, pids)), seconds=30)
    assert last_attempt(run)["code"] == ExitCode.REQUEUE and newest_step(run) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("target", ["group", "launcher"])
def test_hangup_under_a_launcher_is_saved(tmp_path: Path, name: str, target: str) -> None:
    """R13: SIGHUP at `deepspeed` or `torchrun`, alone or with its whole process group."""
    run, port = tmp_path / "run", str(random.Random(f"{name}{target}").randrange(20_000, 30_000))
    words = [str(PYTHON / LAUNCHERS[name][0]), *LAUNCHERS[name][1:], port, str(ROOT / "launcher" / "train.py")]
    words += ["--config", str(TINY), "--run-dir", str(run), *ENDLESS]
    check_launcher(words, run, tmp_path / "log", target, name)


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
@pytest.mark.parametrize("target", ["group", "launcher"])
def test_hangup_under_mpirun_is_saved(tmp_path: Path, target: str) -> None:
    """R13: Open MPI turns SIGHUP into SIGTERM after odls_base_sigkill_timeout seconds, and into SIGKILL after as many again."""
    run = tmp_path / "run"
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--mca", "odls_base_sigkill_timeout", "20", "-n", "2"]
    words += [sys.executable, str(ROOT / "launcher" / "train.py")]
    words += ["--config", str(TINY), "--run-dir", str(run), *ENDLESS]
    check_launcher(words, run, tmp_path / "log", target, "mpirun")


def check_launcher(words: list[str], run: Path, log: Path, target: str, name: str) -> None:
    """Start a launcher in a session of its own, send it SIGHUP, and see that all ranks saved."""
    environment = {**rank_environments(1)[0], "PATH": f"{PYTHON}:{os.environ['PATH']}"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(variable)
    with log.open("w") as file:
        launcher = subprocess.Popen(words, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)
    try:
        eventually(lambda: newest_step(run) > 0)
        found = subprocess.run(["pgrep", "-f", rf"train(\.py)? .*{run} "], capture_output=True, text=True, check=False)
        pids = [int(word) for word in found.stdout.split()]
        assert len(pids) >= 4
        if target == "launcher" and name == "deepspeed":  # the second process that `deepspeed` starts holds the ranks
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGHUP)
        else:
            (os.killpg if target == "group" else os.kill)(launcher.pid, signal.SIGHUP)
        eventually(lambda: all(map(is_gone, pids)), seconds=WAIT_SECONDS)
    finally:
        launcher.kill()
        launcher.wait()
    assert last_attempt(run)["code"] == ExitCode.REQUEUE, log.read_text()[-3000:]
    assert find_checkpoint(run).manifest["clock"]["steps"] == last_attempt(run)["step"]
