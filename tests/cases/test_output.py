"""The reader of the output goes away: a run continues, a command ends quietly, and nothing raises (row R14)."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdit.errors import ExitCode
from sdit.observe.metrics_file import read_metrics
from tests.distributed.harness import ROOT, rank_environments
from tests.faults.ranks import WAIT_SECONDS, eventually, train_command

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
SETTINGS = ("--config", str(TINY))
FULL = Path("/dev/full")


def train(run: Path, *overrides: str, faults: tuple[str, ...] = ()) -> list[str]:
    return [*train_command(*faults), *SETTINGS, "--run-dir", str(run), *overrides]


def environment() -> dict[str, str]:
    return rank_environments(1)[0]


def logged(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "logs").iterdir()))


def test_run_continues_when_the_reader_of_its_output_leaves(tmp_path: Path) -> None:
    """R14: `train ... 2>&1 | head -1`: the run ends with 0, and the files in RUN/logs hold what head did not read."""
    run = tmp_path / "run"
    reading, writing = os.pipe()
    process = subprocess.Popen(
        train(run, "checkpoint.every_steps=5"), stdout=writing, stderr=writing, env=environment()
    )
    os.close(writing)
    with os.fdopen(reading) as reader:
        while not (line := reader.readline()).startswith("ranks: "):
            assert line.startswith("observe.metrics_port: ")  # another run has the port
    assert process.wait(WAIT_SECONDS) == ExitCode.DONE
    assert read_metrics(run)[-1]["step"] == 20
    text = logged(run)
    assert "step 20  images 640/640" in text and text.count("checkpoints/images-") >= 4
    assert "Traceback" not in text and "Logging error" not in text


def test_fatal_line_of_a_run_without_a_reader_is_in_its_logs(tmp_path: Path) -> None:
    """R14: what the supervisor prints is kept as well, and so is a restart after the reader has left."""
    run = tmp_path / "run"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as lost:
        command = train(run, "checkpoint.every_steps=5", faults=("kill@0:7",))
        process = subprocess.Popen(command, stdout=lost, stderr=lost, env=environment())
        assert process.wait(WAIT_SECONDS) == ExitCode.DONE
    assert read_metrics(run)[-1]["step"] == 20
    output = (run / "logs" / "rank-000.output").read_text()
    assert len(re.findall("^FATAL rank 0.*killed by SIGKILL", output, re.MULTILINE)) == 1
    assert "step 20  images 640/640" in output


@pytest.mark.parametrize(
    "redirections",
    [
        "<&- >&- 2>&-",
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2>&-", marks=pytest.mark.slow),
        pytest.param(">/dev/full 2>&1", marks=pytest.mark.slow),
    ],
)
def test_run_needs_no_output_at_all(tmp_path: Path, redirections: str) -> None:
    """R14: descriptors that are closed at the start, or a full disk behind them, cost the output only."""
    run = tmp_path / "run"
    script = f'exec "$@" {redirections}'
    words = ["bash", "-c", script, "bash", *train(run, "train.steps=3")]
    assert subprocess.run(words, env=environment(), timeout=WAIT_SECONDS, check=False).returncode == ExitCode.DONE
    assert read_metrics(run)[-1]["step"] == 3
    assert "step 3  images 96/96" in logged(run)


def test_closed_descriptors_are_not_given_to_files(tmp_path: Path) -> None:
    """R14: with `>&- 2>&-` no file of the run may become descriptor 1 or 2, which libraries in C++ write to."""
    run = tmp_path / "run"
    words = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *train(run, "train.steps=1000000")]
    process = subprocess.Popen(words, env=environment())
    try:
        eventually(lambda: read_metrics(run))
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        for pid in (str(process.pid), child):
            for descriptor in (1, 2):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                assert target == os.devnull or target.endswith("logs/rank-000.output"), target
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == ExitCode.REQUEUE
    finally:
        process.kill()


def test_run_continues_when_its_terminal_is_gone(tmp_path: Path) -> None:
    """R14: after the terminal has hung up, writes to it fail with EIO; a run that ignores SIGHUP continues."""
    run = tmp_path / "run"
    parent, child = pty.openpty()
    words = ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", *train(run, "train.steps=60")]
    process = subprocess.Popen(
        words, stdin=child, stdout=child, stderr=child, env=environment(), start_new_session=True
    )
    os.close(child)
    eventually(lambda: b"ranks" in os.read(parent, 4096) or (run / "metrics.jsonl").exists())
    os.close(parent)
    assert process.wait(WAIT_SECONDS) == ExitCode.DONE
    assert read_metrics(run)[-1]["step"] == 60
    assert "step 60  images 1920/1920" in logged(run) and "Traceback" not in logged(run)


@pytest.mark.slow
def test_reader_that_stops_reading_does_not_hold_up_the_run(tmp_path: Path) -> None:
    """R14: a full pipe that nobody reads (`| sleep inf`) does not block the run; its lines go to RUN/logs."""
    from sdit.output import STUCK_SECONDS

    run = tmp_path / "run"
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:
        try:
            os.write(writing, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writing, True)
    process = subprocess.Popen(train(run), stdout=writing, stderr=writing, env=environment())
    os.close(writing)
    assert process.wait(WAIT_SECONDS + STUCK_SECONDS) == ExitCode.DONE
    os.close(reading)
    assert "step 20  images 640/640" in (run / "logs" / "rank-000.output").read_text()


COMMANDS = {
    "help": ["train.py", "--help"],
    "prepare": ["prepare.py", "digits", "--out", "{folder}/digits", "--samples-per-shard", "1797", "--jobs", "1"],
    "plan": ["plan.py", str(TINY), "--device", "cpu", "--memory-gib", "4"],
    "version": ["../sdit/cli/__main__.py", "--version"],
}


QUICK = ("help", "version")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS if name not in QUICK)]


def command(name: str, folder: Path) -> list[str]:
    script, *words = COMMANDS[name]
    return [sys.executable, str(ROOT / "launcher" / script), *(word.format(folder=folder) for word in words)]


@pytest.mark.parametrize("name", [*QUICK, "prepare"])
def test_command_whose_reader_leaves_ends_quietly(tmp_path: Path, name: str) -> None:
    """R14: `prepare ... | head -0` does its work, and says nothing of a broken pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as lost:
        done = subprocess.run(
            command(name, tmp_path), stdout=lost, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert (done.returncode, done.stderr) == (ExitCode.DONE, "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_command_whose_output_does_not_fit_says_so(tmp_path: Path, name: str) -> None:
    """R14: `plan ... > FULL_DISK` is an input/output error in one line, not a success and not a traceback."""
    with FULL.open("w") as full:
        done = subprocess.run(
            command(name, tmp_path), stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert done.returncode == ExitCode.IO
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: standard output: No space left on device")


@pytest.mark.parametrize("name", NAMES)
def test_command_runs_with_its_output_closed(tmp_path: Path, name: str) -> None:
    """R14: `>&- 2>&-` is no error for a command either."""
    words = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command(name, tmp_path)]
    assert subprocess.run(words, env=environment(), timeout=WAIT_SECONDS, check=False).returncode == ExitCode.DONE


def test_output_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    """R14: a name that the terminal's encoding lacks is printed with escapes, and ends nothing."""
    words = [sys.executable, "-c", "from sdit.output import keep_output; keep_output(); print('\\u2603', '\\udce4')"]
    started = time.monotonic()
    done = subprocess.run(
        words, capture_output=True, text=True, env={**environment(), "PYTHONIOENCODING": "ascii"}, check=False
    )
    assert (done.returncode, done.stdout) == (0, "\\u2603 \\udce4\n"), (done.stderr, time.monotonic() - started)
