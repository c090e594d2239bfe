"""Three hosts with a real network between them: a firewall that the doctor names, and a network that is cut in mid-run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdit.errors import ExitCode
from tests.cluster.hosts import Host, connected_hosts
from tests.cluster.runs import (
    ARGUMENTS,
    NODES,
    RANKS_PER_NODE,
    STEPS,
    assert_same_losses,
    assert_same_run,
    launch_environment,
    wait_until,
)
from tests.distributed.harness import ROOT, metrics_of
from tests.faults.ranks import train_command

pytestmark = pytest.mark.cluster
RANKS = NODES * RANKS_PER_NODE
PORT = "29555"  # nobody else is on these hosts
SECONDS = 240.0
DEADLINES = ("supervise.step_seconds=5", "supervise.first_step_seconds=60", "supervise.start_seconds=60")
SLOWLY = tuple(f"slow@0:{step}" for step in range(STEPS))  # 0.2 s each, in the first attempt
DOCTOR = (sys.executable, str(ROOT / "launcher" / "doctor.py"))


class Launch:
    """A program on every host at once, `RANKS_PER_NODE` ranks each; ended with the `with` block."""

    def __init__(self, hosts: list[Host], folder: Path, *command: str) -> None:
        folder.mkdir()
        self.logs = [folder / str(rank) for rank in range(RANKS)]
        shared = {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": PORT, "WORLD_SIZE": str(RANKS)}
        shared |= {"LOCAL_SIZE": str(RANKS_PER_NODE), "LOCAL_WORLD_SIZE": str(RANKS_PER_NODE)}
        self._processes = []
        for rank, log in enumerate(self.logs):
            node, local_rank = divmod(rank, RANKS_PER_NODE)
            host, environment = hosts[node], launch_environment(**shared, RANK=str(rank), LOCAL_RANK=str(local_rank))
            with log.open("w") as file:
                self._processes.append(
                    subprocess.Popen([*host.enter, *command], env=environment, cwd=ROOT, stdout=file, stderr=file)
                )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def codes(self) -> list[int]:
        return [process.wait(SECONDS) for process in self._processes]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with connected_hosts(NODES) as hosts:
        yield hosts


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_doctor_sees_the_hosts_and_names_the_ports_that_a_firewall_blocks(hosts: list[Host], tmp_path: Path) -> None:
    first, second, _ = hosts
    with Launch(hosts, tmp_path / "open", *DOCTOR, "--json", "--run-dir", str(tmp_path / "run")) as doctor:
        assert doctor.codes() == [ExitCode.DONE] * RANKS, doctor.said(0) + doctor.said(1)
        report = json.loads(doctor.said(0)[doctor.said(0).index("{") :])
        assert [row["host"] for row in report["ranks"]] == [host.name for host in hosts for _ in range(RANKS_PER_NODE)]

    first.firewall("-p", "tcp", "--dport", PORT, "-j", "DROP")
    with Launch(hosts, tmp_path / "master", *DOCTOR, "--timeout-seconds", "6") as doctor:
        assert doctor.codes() == [ExitCode.CRASH] * RANKS
        assert lines_with(
            doctor.said(RANKS_PER_NODE),
            f"{first.name}:{PORT}",
            "a firewall drops the packets",
            f"open port {PORT} between",
        )
        assert lines_with(doctor.said(0), "missing rank 2, 3, 4, 5")
    first.open_up()

    second.firewall("-p", "tcp", "--syn", "-j", "DROP")  # whatever begins elsewhere
    with Launch(hosts, tmp_path / "peers", *DOCTOR) as doctor:
        assert doctor.codes() == [ExitCode.CRASH] * RANKS
        assert lines_with(doctor.said(0), "rank 0", "rank 2", second.address, "a firewall drops the packets"), (
            doctor.said(0)
        )


def test_network_that_is_cut_in_mid_run_costs_an_attempt_and_no_bit(
    hosts: list[Host], reference: Path, tmp_path: Path
) -> None:
    """All packets are dropped for a while: the attempt ends by its deadline, the next one waits until the ranks can meet."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    with Launch(hosts, tmp_path / "straight", *train_command(), "--run-dir", str(whole), *ARGUMENTS) as launch:
        assert launch.codes() == [ExitCode.DONE] * RANKS, launch.said(0) + launch.said(1)
    assert_same_losses(whole, reference)  # what one host trains
    train = (*train_command(*SLOWLY), "--run-dir", str(run), *ARGUMENTS, *DEADLINES)
    with Launch(hosts, tmp_path / "cut", *train) as launch:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 7, SECONDS, "seven steps")
        for host in hosts:
            host.firewall("-j", "DROP")
        wait_until(lambda: "FATAL" in launch.said(0), SECONDS, "the end of the attempt", lambda: launch.said(0))
        for host in hosts:
            host.open_up()
        assert launch.codes() == [ExitCode.DONE] * RANKS, launch.said(0) + launch.said(1)
        (line,) = lines_with(launch.said(0), "FATAL")
    assert "restart 1 of 3 from images-" in line, line
    assert_same_run(run, whole)
