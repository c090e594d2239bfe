"""Starts supervised ranks and waits for them; whatever a test does, nothing it started is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdit.supervise.heartbeat import Heartbeat, Phase
from tests.distributed.harness import ROOT, rank_environments

FAKE = Path(__file__).with_name("fake_rank.py")
LAUNCHER = ROOT / "launcher" / "train.py"
FAULTY_LAUNCHER = Path(__file__).with_name("train_with_faults.py")
WAIT_SECONDS = 120.0
SECOND_LAUNCH = """
import json, signal, subprocess, sys
ranks = [subprocess.Popen(json.loads(sys.argv[1]), env=environment) for environment in json.loads(sys.argv[2])]
signal.signal(signal.SIGTERM, lambda number, frame: [rank.send_signal(number) for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks))
"""


class Ranks:
    """The supervisors of one launch, a process per rank, and what they printed."""

    def __init__(
        self, world: int, command: list[str], log: Path, only: tuple[int, ...] | None = None,
        environments: list[dict[str, str]] | None = None, **environment: str,
    ) -> None:  # fmt: skip
        environments = [{**values, **environment} for values in environments or rank_environments(world)]
        self._start(command, log, environments, only if only is not None else tuple(range(world)))

    def _start(self, command: list[str], log: Path, environments: list[dict[str, str]], only: tuple[int, ...]) -> None:
        self.log, self._command, self._environments = log, command, environments
        self.processes = [self._launch(rank) for rank in only]

    def again(self, log: Path) -> subprocess.Popen:
        """Launch the same command a second time in the same environment, below another process, as another shell does.

        That process passes SIGTERM on and exits with the largest exit code of its ranks.
        """
        words = [sys.executable, "-c", SECOND_LAUNCH, json.dumps(self._command), json.dumps(self._environments)]
        with log.open("a") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT)

    def _launch(self, rank: int) -> subprocess.Popen:
        with self.log.open("a") as file:
            return subprocess.Popen(self._command, env=self._environments[rank], stdout=file, stderr=file, cwd=ROOT)

    def place(self, rank: int) -> tuple[Phase, int]:
        """The phase and the step of a rank, from its heartbeat. Raises: OSError: if there is no heartbeat now."""
        for link in Path(f"/proc/{self.processes[rank].pid}/fd").iterdir():
            if "sdit-heartbeat" in os.readlink(link):
                heartbeat = Heartbeat(os.open(link, os.O_RDWR))
                state = heartbeat.read()
                heartbeat.close()
                return state.phase, state.step
        raise OSError(f"rank {rank} has no heartbeat")

    def join(self, rank: int) -> None:
        """Start a rank that was not among those started first."""
        self.processes.append(self._launch(rank))

    def replace(self, rank: int) -> None:
        """Start a rank that has ended again, as the controller of a Kubernetes Job would."""
        assert self.processes[rank].wait(WAIT_SECONDS) is not None
        self.processes[rank] = self._launch(rank)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def codes(self, seconds: float = WAIT_SECONDS) -> list[int]:
        """Exit codes of all ranks, when they have ended."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def fatal(self) -> list[str]:
        """The lines that say why the run, or an attempt, ended."""
        return [line for line in self.output.splitlines() if line.startswith(("FATAL", "error:"))]

    def child_pid(self, rank: int) -> int:
        """Process id of the real rank, once it runs."""
        parent = self.processes[rank].pid
        return int(eventually(lambda: Path(f"/proc/{parent}/task/{parent}/children").read_text().split())[0])

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)


def start_fake(
    world: int, run_dir: Path, steps: int = 12, only: tuple[int, ...] | None = None,
    environments: list[dict[str, str]] | None = None, **options: object,
) -> Ranks:  # fmt: skip
    """Fake ranks under real supervisors; options as fake_rank.py takes them."""
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, str(FAKE), str(run_dir), str(steps), json.dumps(options)]
    return Ranks(world, command, run_dir.with_suffix(".log"), only, environments)


def start_real(
    world: int, run_dir: Path, config: Path, *arguments: str, stage: int = 1, log: Path | None = None,
    faults: Sequence[str] = (),
) -> Ranks:  # fmt: skip
    """The command that a user gives, once per rank; the `faults` strike in it. `log`: default is next to the run."""
    command = [*train_command(*faults), *train_words(run_dir, config, stage), *arguments]
    return Ranks(world, command, log or run_dir.with_suffix(".log"))


def train_words(run_dir: Path, config: Path, stage: int = 1) -> list[str]:
    """The arguments of `launcher/train.py` that all runs have."""
    deepspeed = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    return ["--config", str(config), "--ds_config", str(deepspeed), "--run-dir", str(run_dir)]


def train_command(*faults: str) -> list[str]:
    """The beginning of a command that trains, with `faults` such as kill@0:7."""
    if not faults:
        return [sys.executable, str(LAUNCHER)]
    return [sys.executable, str(FAULTY_LAUNCHER), *(f"--fault={fault}" for fault in faults)]


def eventually(look: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """The first true value of `look()`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = look()
        except OSError:
            value = None
        if value:
            return value
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a corpse that nobody buried counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def newest_step(run_dir: Path) -> int:
    """Number of the newest checkpoint of a fake run; 0: none."""
    names = os.listdir(run_dir / "checkpoints") if (run_dir / "checkpoints").is_dir() else []
    return max((int(name.removeprefix("images-")) for name in names if name.startswith("images-")), default=0)
