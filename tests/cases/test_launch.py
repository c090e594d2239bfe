"""A launch never harms another, ranks leave with their launcher, and a run that is not complete says so (S1, S5, S10, S12)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdit.cli.report import main as report
from sdit.cli.train import main as train
from sdit.errors import ExitCode
from sdit.supervise.lock import identity
from sdit.supervise.membership import DOUBT_SECONDS
from tests.cases.launches import Launch, environments
from tests.distributed.forks import fork_script
from tests.distributed.harness import ROOT
from tests.faults.ranks import WAIT_SECONDS, eventually, is_gone, newest_step, start_fake

DEAD = {"host": socket.gethostname(), "pid": 1, "started": "1", "token": "0" * 32, "beats": 0}
CONTESTANTS, ROUNDS = 6, 4
CONTEST = """
import sys, time
from pathlib import Path
from sdit.errors import ConfigError
from sdit.supervise.lock import RunLock
held = []
print("ready", flush=True)
start = float(sys.stdin.readline())
for round in range(int(sys.argv[2])):
    time.sleep(max(0.0, start + float(sys.argv[3]) * round - time.time()))
    try:
        held.append(RunLock(Path(sys.argv[1], str(round)), watch_seconds=1.0))
        print(round, flush=True)
    except ConfigError:
        pass
print("end", flush=True)
sys.stdin.readline()
"""


def lock_body(kind: str) -> str | None:
    """Content of a lock file that nobody holds; None: no file."""
    dead = json.dumps({**identity(os.getpid()), **DEAD})
    return {"none": None, "empty": "", "torn": '{"host": "el', "deep": "[" * 60_000, "dead": dead}[kind]


@pytest.mark.parametrize("kind", ["none", "empty", "torn", "deep", "dead"])
def test_one_of_many_simultaneous_starts_holds_the_lock(tmp_path: Path, kind: str) -> None:
    """S12: Of several starts at once on a missing, empty, damaged or dead lock file, exactly one holds the lock."""
    body = lock_body(kind)
    for number in range(ROUNDS):
        (tmp_path / str(number)).mkdir()
        if body is not None:
            (tmp_path / str(number) / "lock.json").write_text(body)
    command = [sys.executable, "-c", CONTEST, str(tmp_path), str(ROUNDS), "0.1" if kind in ("none", "dead") else "1.4"]
    with contextlib.ExitStack() as stack:
        contestants = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            )
            for _ in range(CONTESTANTS)
        ]
        for each in contestants:
            assert each.stdout is not None and each.stdout.readline() == "ready\n"
        for each in contestants:
            assert each.stdin is not None
            each.stdin.write(f"{time.time() + 0.2}\n")
            each.stdin.flush()
        won = [line.strip() for each in contestants for line in iter(each.stdout.readline, "end\n")]
        left = [sorted(path.name for path in (tmp_path / str(number)).iterdir()) for number in range(ROUNDS)]
        for each in contestants:
            each.communicate("\n")
    assert sorted(won) == [str(number) for number in range(ROUNDS)]
    assert left == [["lock.json"]] * ROUNDS  # nothing is left of the contest


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "unreadable"])
def test_odd_lock_is_refused_in_one_line(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """S12: A lock that is no file that can be read is left alone and named, with exit 78."""
    path = tmp_path / "lock.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        path.write_text("{}")
        path.chmod(0)
    assert train(["--run-dir", str(tmp_path)]) == ExitCode.CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "legal:" in line
    assert [each.name for each in tmp_path.iterdir()] == ["lock.json"]


def test_second_launch_leaves_a_healthy_run_alone(tmp_path: Path) -> None:
    """S1: The same command again, three times, on the same port: refused in one line; nothing reaches the first run."""
    run, same = tmp_path / "run", environments(3)
    watched: list[dict] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for path in (run / "supervise").glob("*/plan.json"):
                with contextlib.suppress(OSError, ValueError):
                    watched.append(json.loads(path.read_text()))

    with Launch(run, same, 100_000, step_seconds=0.02) as first:
        eventually(lambda: newest_step(run) >= 4)
        thread = threading.Thread(target=watch)
        thread.start()
        before = sorted(path.name for path in (run / "supervise").iterdir())
        try:
            for _ in range(3):
                with Launch(run, same, 100_000) as second:
                    assert second.process.wait(60) == ExitCode.CONFIG
                    eventually(lambda ranks=second.ranks: all(map(is_gone, ranks)), seconds=20)
                (line,) = [line for line in second.output.splitlines() if line.startswith(("error:", "FATAL"))]
                assert f"in use by process {first.ranks[0]} on host" in line
        finally:
            done.set()
            thread.join()
        assert watched and {plan["code"] for plan in watched} == {None}
        assert before == sorted(path.name for path in (run / "supervise").iterdir())
        assert first.process.poll() is None and not any(map(is_gone, first.ranks))
        at = newest_step(run)
        eventually(lambda: newest_step(run) > at, seconds=20)
        assert first.output == ""


@pytest.mark.parametrize("outer", ["deepspeed", "my-launcher"])
def test_one_of_three_simultaneous_launches_trains(tmp_path: Path, outer: str) -> None:
    """S1: Of three launches at once on one port, one runs to its end with all its ranks; the others are refused."""
    run, same = tmp_path / "run", environments(2)
    inner = "torchrun" if outer == "deepspeed" else "helper"
    with contextlib.ExitStack() as stack:
        launches = [
            stack.enter_context(Launch(run, same, 40, inner=inner, outer=outer, step_seconds=0.1)) for _ in range(3)
        ]
        codes = [launch.process.wait(90) for launch in launches]
        outputs = [launch.output for launch in launches]
    assert sorted(codes) == [ExitCode.DONE, ExitCode.CONFIG, ExitCode.CONFIG], outputs
    assert newest_step(run) == 40


def test_ranks_of_a_refused_launch_leave_without_its_launcher(tmp_path: Path) -> None:
    """S1: Where no launcher ends them, the other ranks of a refused launch leave by themselves, with its exit code."""
    run = tmp_path / "run"
    with start_fake(3, run, steps=100_000, step_seconds=0.02) as first:
        eventually(lambda: newest_step(run) >= 4)
        with start_fake(3, run) as second:
            assert second.codes(seconds=30) == [ExitCode.CONFIG] * 3
        assert len(second.fatal) == 1
        assert all(process.poll() is None for process in first.processes)
        ranks_here = [path.name for path in (run / "supervise" / "waiting").iterdir()]
        assert len(ranks_here) == 2  # the first launch's ranks 1 and 2


def test_second_launch_refuses_no_replaced_rank_of_the_first(tmp_path: Path) -> None:
    """S1: A replaced rank that the holder does not list yet is not a rank of another shell's launch on the same port."""
    run, same = tmp_path / "run", environments(2)
    with start_fake(2, run, steps=100_000, step_seconds=0.02, environments=same) as first:
        eventually(lambda: newest_step(run) >= 4)
        first.send(1, signal.SIGKILL)
        first.replace(1)
        with Launch(run, same, 100_000, inner="helper", outer="my-launcher") as second:
            assert second.process.wait(60) == ExitCode.CONFIG
            eventually(lambda: all(map(is_gone, second.ranks)), seconds=20)
        assert not list((run / "supervise" / "waiting").glob("*.refused"))
        time.sleep(DOUBT_SECONDS + 1)  # a refused rank waits for so long
        assert first.processes[1].poll() is None


def test_members_are_of_one_launch() -> None:
    """S1: The lock's holder admits a rank of its own launcher, and none of another one, whatever the variables say."""
    from sdit.supervise.admission import admit
    from sdit.supervise.launch import LaunchIdentity
    from sdit.supervise.members import Member

    def member(
        rank: int, nonce: str, variables: str = "v", node: str = "n0", launcher: str = "7 100", parent: str = ""
    ) -> Member:
        return Member(rank, nonce, "host", 1, "digest", launch=LaunchIdentity(variables, node, launcher, parent))

    zero = member(0, "a")
    mine, other = member(1, "b"), member(1, "c", launcher="8 200")
    assert admit({0: zero}, [other, mine], 2) == {0: zero, 1: mine}
    assert admit({0: zero}, [member(1, "d", variables="w", node="n1")], 2) == {0: zero}
    assert admit({0: zero, 1: mine}, [mine, member(1, "e")], 2) == {0: zero, 1: mine}  # the rank is taken
    assert admit({0: zero, 1: mine}, [member(1, "e")], 2)[1].nonce == "e"  # its first supervisor was lost
    there = [member(2, "f", node="n1", launcher="9 1"), member(3, "g", node="n1", launcher="9 2")]
    assert set(admit({0: zero}, there, 4)) == {0, 2}  # ranks of another node agree among themselves
    start = {0: member(0, "a", launcher="", parent="5 1")}
    ranks = [member(1, "j", launcher="", parent="6 1"), member(2, "k", launcher="", parent="5 1")]
    assert set(admit(start, ranks, 3)) == {0, 2}  # an unknown launcher's ranks mostly have one parent
    assert set(admit(start, ranks, 3, settled={"j", "k"})) == {0, 1, 2}  # if not, they are admitted a little later
    assert set(admit({0: zero}, [member(5, "h"), member(0, "i")], 4)) == {0}


@pytest.mark.parametrize(
    ("who", "number"),
    [
        ("deepspeed", signal.SIGTERM),
        ("helper", signal.SIGKILL),
        pytest.param("deepspeed", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("helper", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_ranks_leave_with_any_process_of_their_launcher(tmp_path: Path, who: str, number: signal.Signals) -> None:
    """S5: SIGTERM or SIGKILL of the outer or the inner launcher: the ranks save and leave; the next look says why."""
    run = tmp_path / "run"
    with Launch(run, environments(2), 100_000, step_seconds=0.02) as launch:
        eventually(lambda: newest_step(run) >= 4)
        os.kill(launch.process.pid if who == "deepspeed" else launch.helper(), number)
        eventually(lambda: all(map(is_gone, launch.ranks)), seconds=20)
    end = json.loads((run / "logs" / "attempts.jsonl").read_text().splitlines()[-1])
    assert end["code"] == ExitCode.REQUEUE and newest_step(run) - end["step"] in (0, 1)  # a fake counts a step late
    assert "gone" in end["text"]
    (run / "config.yaml").write_text("seed: 1\n")
    with start_fake(2, run, steps=newest_step(run) + 2) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2
    (line,) = [line for line in ranks.output.splitlines() if "before the run was complete" in line]
    assert f"step {end['step']}" in line and "is gone (exit 75)" in line


def test_run_outlives_the_shell_that_started_its_launcher(tmp_path: Path) -> None:
    """S5: `nohup deepspeed ... &` from a shell that ends: that is no process of the launcher."""
    run = tmp_path / "run"
    shell = ("bash", "-c", 'nohup "$@" & sleep 0.3', "bash")
    with Launch(run, environments(2), 60, *shell, step_seconds=0.05) as launch:
        eventually(lambda: launch.process.poll() is not None)
        eventually(lambda: newest_step(run) == 60, seconds=60)
        eventually(lambda: all(map(is_gone, launch.ranks)), seconds=20)
    assert "gone" not in launch.output and not (run / "unfinished.json").exists()


def test_run_that_was_killed_says_so_until_it_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S5: After SIGKILL of everything, report and doctor say that the run is not complete; while it trains they do not."""
    run = tmp_path / "run"

    def looks() -> str:
        (run / "config.yaml").write_text("seed: 1\n")
        assert report([str(run)]) == ExitCode.DONE
        return capsys.readouterr().err

    with start_fake(2, run, steps=100_000, step_seconds=0.02) as ranks:
        eventually(lambda: newest_step(run) >= 8)
        assert "before the run was complete" not in looks()
        for process in ranks.processes:
            process.kill()
        eventually(lambda: all(is_gone(process.pid) for process in ranks.processes))
    assert "the last launch ended before the run was complete: newest checkpoint images-" in looks()
    assert "Not complete" in (run / "report.html").read_text()
    doctor = [sys.executable, str(ROOT / "launcher" / "doctor.py"), "--run-dir", str(run)]
    found = subprocess.run(doctor, capture_output=True, text=True, check=True)
    assert "the last launch ended before the run was complete" in found.stdout
    with start_fake(2, run, steps=newest_step(run) + 2) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2
    assert "before the run was complete" in ranks.output
    assert "before the run was complete" not in looks()


LISTEN = """
import os
from sdit.distributed.comm import Comm, find_rank
with Comm(find_rank(os.environ), device="cpu") as comm:
    comm.barrier()
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
    for kind in ("tcp", "tcp6"):
        for words in map(str.split, open(f"/proc/net/{kind}").readlines()[1:]):
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                print("listens", comm.rank, words[1].split(":")[0])
    comm.barrier()
"""


def listening(folder: Path, **variables: str) -> list[list[str]]:
    """What two ranks in such an environment listen on: rows of a rank and an address."""
    script, log = folder / "listen.py", folder / "log"
    script.write_text(LISTEN)
    ranks = [fork_script(script, (), each | variables, log) for each in environments(2)]
    for rank in ranks:
        rank.join(WAIT_SECONDS)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0, 0], log.read_text()
    return [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("listens")]


@pytest.mark.parametrize(
    "address",
    [
        socket.gethostname(),
        pytest.param("127.0.0.1", marks=pytest.mark.slow),
        pytest.param("localhost", marks=pytest.mark.slow),
    ],
)
def test_ranks_of_one_node_listen_on_loopback_only(tmp_path: Path, address: str) -> None:
    """S10: The rendezvous store, and gloo, of ranks on one node cannot be reached from other machines."""
    found = listening(tmp_path, MASTER_ADDR=address)
    assert {rank for rank, _ in found} == {"0", "1"}
    assert {where for _, where in found} == {"0100007F"}


def test_ranks_of_several_nodes_listen_where_others_reach_them(tmp_path: Path) -> None:
    """S10: Where the launcher names several nodes, the store listens on all addresses, so that they can meet."""
    nodes = {"LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": socket.gethostbyname(socket.gethostname())}
    if nodes["MASTER_ADDR"].startswith("127."):
        pytest.skip("this host has no address but loopback")
    assert {"00000000", "0" * 32} & {where for rank, where in listening(tmp_path, **nodes) if rank == "0"}
