"""The container's entrypoint and health check, with a stand-in for `sdit` and for /proc."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from sdit.launch_environment import find_rank
from tests.distributed.harness import ROOT

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
WAIT_SECONDS = 60.0
SHOW = 'env > "$OUT/$$"'


def start(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """The entrypoint in a process group of its own, as below `tini -g`; `script` is what `sdit` does."""
    stand_in = folder / "sdit"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "OUT": str(folder / "out"), **variables}
    (folder / "out").mkdir()
    return subprocess.Popen(
        [str(ENTRYPOINT), *arguments], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def environments(folder: Path) -> list[dict[str, str]]:
    """What each started `sdit` saw."""
    texts = [path.read_text() for path in (folder / "out").iterdir()]
    return [dict(line.partition("=")[::2] for line in text.splitlines()) for text in texts]


@pytest.mark.parametrize(("verb", "ranks"), [("train", 3), ("doctor", 3), ("sample", 1), ("--help", 1)])
def test_a_node_starts_its_ranks(tmp_path: Path, verb: str, ranks: int) -> None:
    assert start(tmp_path, SHOW, verb, RANKS_PER_NODE="3").wait(WAIT_SECONDS) == 0
    found = [find_rank(environment) for environment in environments(tmp_path)]
    assert sorted((info.rank, info.world, info.local_rank, info.local_world) for info in found) == [
        (rank, ranks, rank, ranks) for rank in range(ranks)
    ]


@pytest.mark.parametrize("each", [1, 2])
def test_pods_number_their_ranks(tmp_path: Path, each: int) -> None:
    pod = {"JOB_COMPLETION_INDEX": "1", "NNODES": "3", "RANKS_PER_NODE": str(each)}
    assert start(tmp_path, SHOW, "train", **pod).wait(WAIT_SECONDS) == 0
    found = sorted((find_rank(environment) for environment in environments(tmp_path)), key=lambda info: info.rank)
    assert [(info.rank, info.world) for info in found] == [(each + local, 3 * each) for local in range(each)]
    assert {info.source for info in found} == {"Kubernetes"}


@pytest.mark.parametrize(
    ("codes", "want"), [("0 0", 0), ("75 75", 75), ("70 kill", 70), ("kill 70", 70), ("0 kill", 137), ("78 0", 78)]
)
def test_the_ranks_exit_code_is_the_containers(tmp_path: Path, codes: str, want: int) -> None:
    script = f'set -- {codes}; shift "$LOCAL_RANK"; [ "$1" = kill ] && kill -KILL $$; exit "$1"'
    assert start(tmp_path, script, "train", RANKS_PER_NODE="2").wait(WAIT_SECONDS) == want


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_all_ranks_and_their_exit_code_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    script = "import os, signal, sys, time\n"
    script += "def leave(*_):\n    time.sleep(0.3)\n    os._exit(75)\n"
    script += "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n    signal.signal(number, leave)\n"
    script += "open(f\"{os.environ['OUT']}/{os.getpid()}\", 'w')\ntime.sleep(100)\n"
    (tmp_path / "rank.py").write_text(script)
    process = start(tmp_path, f"exec python3 {tmp_path}/rank.py", "train", RANKS_PER_NODE="2")
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(list((tmp_path / "out").iterdir())) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number)
        assert process.wait(WAIT_SECONDS) == 75
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("ranks", ["two", "0", "-1", "1.5"])
def test_a_wrong_number_of_ranks_is_refused(tmp_path: Path, ranks: str) -> None:
    process = start(tmp_path, SHOW, "train", RANKS_PER_NODE=ranks)
    _, text = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 78 and not environments(tmp_path)
    assert text == f"error: RANKS_PER_NODE: '{ranks}' is not legal; legal: a whole number from 1\n"


@pytest.fixture(scope="module")
def health() -> ModuleType:
    spec = importlib.util.spec_from_file_location("health", ROOT / "docker" / "health.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(proc: Path, pid: int, command: str, count: int = 7) -> Path:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")
    (folder / "status").write_text(f"Name:\tx\nvoluntary_ctxt_switches:\t{count}\nnonvoluntary_ctxt_switches:\t1\n")
    return folder / "status"


def test_supervisors_are_told_from_ranks_and_others(health: ModuleType, tmp_path: Path) -> None:
    put(tmp_path, 1, "tini -g -- /opt/sdit/docker/entrypoint.sh train --config x")
    put(tmp_path, 8, "/opt/venv/bin/python3 /opt/venv/bin/sdit train --config x")
    put(tmp_path, 9, "/opt/venv/bin/python3 -P -m sdit.cli.train --config x")
    (tmp_path / "self").mkdir()
    assert health.supervisors(tmp_path) == [8] and health.naps(8, tmp_path) == 7 and health.naps(10, tmp_path) is None


def test_a_supervisor_that_does_not_move_is_trouble(health: ModuleType, tmp_path: Path) -> None:
    put(tmp_path, 1, "tini -g -- /opt/sdit/docker/entrypoint.sh train")
    assert health.trouble(tmp_path) == "0 of 1 supervisors run"
    status = put(tmp_path, 8, "python /opt/venv/bin/sdit train")
    assert health.trouble(tmp_path, watch_seconds=0.3) == "supervisor 8 does not move"
    assert health.trouble(tmp_path, ranks=2) == "1 of 2 supervisors run"
    moved = threading.Timer(0.3, lambda: status.write_text("voluntary_ctxt_switches:\t9\n"))
    moved.start()
    assert health.trouble(tmp_path, watch_seconds=WAIT_SECONDS) == ""
    moved.join()


def test_other_verbs_are_well_while_they_run(health: ModuleType, tmp_path: Path) -> None:
    put(tmp_path, 1, "tini -g -- /opt/sdit/docker/entrypoint.sh sample --checkpoint train")
    assert health.trouble(tmp_path) == ""
