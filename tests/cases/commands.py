"""Runs launchers as users do: in this process where they start nothing, else in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdit import cli
from tests.distributed.forks import fork_script

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
RANK_WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How a launcher ended."""

    status: int
    out: str
    err: str

    def refused(self, status: int, *words: str) -> None:
        """Assert that one line on stderr refuses the command and holds all words."""
        assert self.status == status, self
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        for word in words:
            assert word in self.err, (word, self.err)


def call(capsys: pytest.CaptureFixture[str], *words: object) -> Ended:
    """Return how `sdit VERB ...` ends in this process."""
    capsys.readouterr()
    try:
        status = cli.run([str(word) for word in words])
    except SystemExit as end:
        status = int(end.code or 0)
    shown = capsys.readouterr()
    return Ended(status, shown.out, shown.err)


def start(*words: object, cwd: Path | None = None, seconds: float = 120, **variables: str) -> Ended:
    """Return how `launcher/VERB.py ...` ends as a process of its own."""
    verb, *rest = (str(word) for word in words)
    done = subprocess.run(
        [sys.executable, str(launcher(verb)), *rest],
        cwd=cwd, env=inherited() | variables, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def fork(*words: object, seconds: float = 120) -> Ended:
    """Return how `launcher/VERB.py ...` ends as a process that forks, without the time of its imports."""
    verb, *rest = (str(word) for word in words)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = fork_script(launcher(verb), rest, inherited(), out, err)
        process.join(seconds)
        status = process.exitcode
        process.kill()
        assert status is not None, f"no end after {seconds} s: {err.read_text()}"
        return Ended(status, out.read_text(), err.read_text())


def launcher(verb: str) -> Path:
    return ROOT / "launcher" / f"{verb}.py"


def inherited() -> dict[str, str]:
    """The environment of a single process."""
    return {name: value for name, value in os.environ.items() if name not in RANK_WORDS} | {"OMP_NUM_THREADS": "1"}
