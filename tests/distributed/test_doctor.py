"""The doctor on real ranks: a healthy launch, and every way in which one can be ill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from sdit.config import load_config
from sdit.planner.hardware import read_hardware
from sdit.planner.layout import plan_job
from sdit.planner.step_time import predict_step
from sdit.planner.traffic import plan_exchange
from tests.distributed.forks import fork_script
from tests.distributed.harness import ROOT, rank_environments

DOCTOR = ROOT / "launcher" / "doctor.py"
DEADLINE_SECONDS = 150
MISSING_SECONDS = "12"  # the doctor's patience where it must run out; the ranks that are there need a second or two

DIES_AFTER_JOINING = """
import os, signal
from sdit.doctor.connection import find_endpoint
from sdit.doctor.rendezvous import Rendezvous
from sdit.launch_environment import find_rank
info = find_rank(os.environ)
Rendezvous(info, find_endpoint(info, os.environ), 60.0).attend()
os.kill(os.getpid(), signal.SIGKILL)
"""


SKEWED = """
import os, sys, time
from sdit.cli.doctor import main
clock = time.time
if os.environ["RANK"] == "1":
    time.time = lambda: clock() - 7.5
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Outcome:
    code: int | None
    out: str
    err: str


def fork(
    folder: Path, environments: Sequence[Mapping[str, str]], *options: str, script: Path = DOCTOR
) -> list[tuple[ForkServerProcess, Path, Path]]:
    """Start a rank with each of the environments. Return the processes with the files of their output and errors."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    files = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(len(environments))]
    return [
        (fork_script(script, options, environment, *streams), *streams)
        for environment, streams in zip(environments, files, strict=True)
    ]


def examine(
    folder: Path, world: int, *options: str, ranks: Sequence[int] | None = None, script: Path = DOCTOR, **variables: str
) -> list[Outcome]:
    """Run the doctor as the given ranks (default: all) of a launch of `world`; `variables` replace the environment's.

    Return how each ended, in the order of `ranks`. `folder` receives what they print.
    """
    environments = rank_environments(world)
    chosen = [environments[rank] | variables for rank in (range(world) if ranks is None else ranks)]
    return [ended(*each) for each in fork(folder, chosen, *options, script=script)]


def ended(process: ForkServerProcess, out: Path, err: Path) -> Outcome:
    """How a forked rank ended. It is killed at the time limit."""
    process.join(DEADLINE_SECONDS)
    code = process.exitcode
    process.kill()
    return Outcome(code, out.read_text(), err.read_text())


def examine_unforked(world: int, *options: str) -> list[Outcome]:
    """Run the doctor as all ranks of a launch, in processes that import what they need themselves."""
    command = [sys.executable, str(DOCTOR), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=each, **pipes) for each in rank_environments(world)]  # type: ignore[call-overload]
    try:
        outputs = [process.communicate(timeout=DEADLINE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Outcome(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_healthy_launch_passes_with_all_pairs_measured(world: int, tmp_path: Path) -> None:
    hardware_file = tmp_path / "hardware.yaml"
    found = examine_unforked(
        world, "--json", "--run-dir", str(tmp_path / "run"), "--write", str(hardware_file), "--threads", "1"
    )
    assert [outcome.code for outcome in found] == [0] * world, found
    report = json.loads(found[0].out)
    assert report["ok"] and all(check["ok"] for check in report["checks"])
    assert [row["rank"] for row in report["ranks"]] == list(range(world))
    pairs = report["fabric"]["pairs"]
    assert sorted(tuple(pair["ranks"]) for pair in pairs) == [(a, b) for a in range(world) for b in range(a + 1, world)]
    assert all(pair["latency_seconds"] > 0 and pair["bytes_per_second"] > 0 for pair in pairs)
    assert report["fabric"]["all_to_all_bytes_per_second"] > 0
    assert report["fabric"]["first_collective_seconds"] > 0
    assert all(not outcome.out for outcome in found[1:])
    check_measured_hardware(hardware_file, world)
    assert list(tmp_path.iterdir()) == [hardware_file]


def check_measured_hardware(path: Path, world: int) -> None:
    """The file is a legal hardware file, measured on one node, and a step can be predicted from it."""
    hardware = read_hardware(path)
    assert hardware.device.kind == "cpu" and sorted(hardware.device.mfu) == [128, 256, 384]
    assert hardware.between == hardware.inside and "between: there is one node" in hardware.sources[1]
    assert f"on {world} ranks, 1 nodes: CPU" in hardware.sources[0]
    assert all(each.gigabytes_per_second > 0 < each.fixed_microseconds for _, each in hardware.inside)
    assert hardware.host.step_milliseconds > 0 < hardware.storage.total_gigabytes_per_second
    config = load_config(ROOT / "configs" / "digits.yaml", [f"train.global_batch={8 * world}"])
    job = plan_job(config, {}, "test", world, world)
    assert predict_step(job, plan_exchange(job, "random"), hardware).total > 0


def test_single_process_passes_and_shows_a_table(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(DOCTOR), "--run-dir", str(tmp_path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr
    assert lines_with(result.stdout, "ok", "versions", "torch")


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Launches that wait in vain for a rank: one is missing, one dies after it has joined, one comes twice.

    They wait at the same time.
    """
    folder, options = tmp_path_factory.mktemp("incomplete"), ("--timeout-seconds", MISSING_SECONDS)
    dies = folder / "dies.py"
    dies.write_text(DIES_AFTER_JOINING)
    (zero, one), missing, twice = rank_environments(2), rank_environments(3), rank_environments(3)
    started = {
        "missing": fork(folder, [missing[0], missing[2]], *options),
        "dies": [*fork(folder, [zero], *options), *fork(folder, [one], script=dies)],
        "twice": fork(folder, [twice[0], twice[1], twice[1]], *options),
    }
    return {name: [ended(*rank) for rank in ranks] for name, ranks in started.items()}


def test_missing_rank_is_named(incomplete: dict[str, list[Outcome]]) -> None:
    zero, two = incomplete["missing"]
    assert (zero.code, two.code) == (70, 70), (zero, two)
    assert lines_with(zero.err, "1 of 3 ranks did not come", "missing rank 1", socket.gethostname())
    assert not two.err  # rank 0 has said it


def test_rank_that_dies_during_the_checks_is_named(incomplete: dict[str, list[Outcome]]) -> None:
    """Rank 1 joins and is killed. Rank 0 ends by its time limit and names the rank."""
    whole, killed = incomplete["dies"]
    assert killed.code == -signal.SIGKILL
    assert whole.code == 70 and lines_with(whole.err, "missing rank 1"), whole


def test_rank_that_comes_twice_is_named(incomplete: dict[str, list[Outcome]]) -> None:
    first, *both = incomplete["twice"]
    assert [outcome.code for outcome in (first, *both)] == [70] * 3, (first, both)
    assert lines_with(first.err, "missing rank 2")
    said = [bool(lines_with(outcome.err, "rank 1 came twice", socket.gethostname())) for outcome in both]
    assert said.count(True) == 1


@pytest.mark.slow
def test_ranks_of_torchrun_share_its_agents_store(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(DOCTOR), "--json", "--run-dir", str(tmp_path)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] and [row["found_by"] for row in report["ranks"]] == ["torchrun"] * 2


def test_unresolvable_master_is_named(tmp_path: Path) -> None:
    (found,) = examine(tmp_path, 2, "--timeout-seconds", "2", ranks=[1], MASTER_ADDR="no-such-host.invalid")
    assert found.code == 70
    assert lines_with(found.err, "no-such-host.invalid", "cannot be resolved", "set MASTER_ADDR")
    assert len(found.err.splitlines()) == 1


def test_master_where_nobody_listens_is_named(tmp_path: Path) -> None:
    (found,) = examine(tmp_path, 2, "--timeout-seconds", "2", ranks=[1], MASTER_ADDR="127.0.0.9")
    assert found.code == 70
    assert lines_with(found.err, "127.0.0.9:", "nobody listens there", "rank 0 was started")


def test_master_that_is_another_host_is_told_by_rank_0_itself(tmp_path: Path) -> None:
    """192.0.2.1 is reserved for documentation: no host has it."""
    (found,) = examine(tmp_path, 2, "--timeout-seconds", "2", ranks=[0], MASTER_ADDR="192.0.2.1")
    assert found.code == 70
    assert lines_with(found.err, "192.0.2.1:", "this is rank 0", "set MASTER_ADDR")


@contextlib.contextmanager
def silent_listener() -> Iterator[int]:
    """The port of a listener that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_port_held_by_another_program_is_named(tmp_path: Path) -> None:
    with silent_listener() as port:
        found = examine(tmp_path, 2, "--timeout-seconds", "5", MASTER_PORT=str(port))
    assert {outcome.code for outcome in found} == {70}, found
    assert lines_with(found[0].err, f"MASTER_PORT {port} is taken", "set it to a free port")
    assert lines_with(found[1].err, f":{port}", "is not rank 0", "free port")


def test_full_disk_and_skewed_clock_are_both_told(tmp_path: Path) -> None:
    script = tmp_path / "skewed.py"
    script.write_text(SKEWED)
    found = examine(tmp_path, 2, "--min-disk-gib", "1e9", "--run-dir", str(tmp_path), script=script)
    assert {outcome.code for outcome in found} == {78}, found
    assert lines_with(found[0].err, "error: run folder", str(tmp_path), "--min-disk-gib asks for 1e+09")
    assert lines_with(found[0].err, "error: clocks", "rank 1", "7.5 s behind rank 0's")
    assert lines_with(found[0].out, "FAIL", "clocks") and lines_with(found[0].out, "ok", "all-reduce")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_file_system_is_named(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (small_disk / "filler").write_bytes(b"0" * (1 << 20))
    (found,) = examine(tmp_path_factory.mktemp("output"), 1, "--run-dir", str(small_disk / "run"))
    assert found.code == 78
    assert lines_with(found.err, str(small_disk), "cannot be written: No space left on device", "--run-dir")


@pytest.mark.slow
def test_ranks_of_different_launches_are_told_apart(tmp_path: Path) -> None:
    own, other = rank_environments(2)
    environments = [own, {**other, "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}]
    first, stranger = (ended(*each) for each in fork(tmp_path, environments, "--timeout-seconds", MISSING_SECONDS))
    assert stranger.code == 70 and lines_with(stranger.err, "expects 4 ranks", "one launcher"), stranger
    assert first.code == 70 and lines_with(first.err, "missing rank 1"), first
