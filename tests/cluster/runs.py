"""The small run that every launcher makes here, and how two of them are compared."""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed.harness import ROOT, numbers_of, tensors_of

BIN = Path(sys.executable).parent
TINY = ROOT / "tests" / "distributed" / "tiny.yaml"
DEEPSPEED_JSON = ROOT / "configs" / "deepspeed" / "zero1.json"
RANKS, STEPS, BATCH = 4, 40, 24  # the ranks of one node; four and six divide the batch
NODES, RANKS_PER_NODE = 3, 2  # of a run on several nodes
OVERRIDES = (
    f"train.steps={STEPS}", f"train.global_batch={BATCH}", "parallel.expert=2", "checkpoint.every_steps=5",
    "checkpoint.keep_last=9",
)  # fmt: skip
ARGUMENTS = ("--config", str(TINY), "--ds_config", str(DEEPSPEED_JSON), *OVERRIDES)
# A sample grid after every step, about 0.3 s, gives time to disturb a run. No weight and no loss depends on it.
SLOWLY = (f"sample.every_images={BATCH}", "sample.steps=10")
LAW = ("step", "images_seen", "loss", "mse", "prior_loss", "grad_norm", "learning_rate")
STATE = ("weight", "ema", "exp_avg", "exp_avg_sq")
RUN_SECONDS = 240.0


def launch_environment(**more: str) -> dict[str, str]:
    """What a user has who activated the virtual environment; ranks share the machine's few cores."""
    path = f"{BIN}:{more.pop('PATH', os.environ['PATH'])}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launch(*command: str, **more: str) -> str:
    """Run a launcher's command to its end, which must be a good one, and return what it printed."""
    result = subprocess.run(
        command, cwd=ROOT, env=launch_environment(**more), timeout=RUN_SECONDS, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, f"{command[0]} ended with {result.returncode}\n{result.stdout[-4000:]}"
    return result.stdout


def commit_all(folder: Path) -> Path:
    """A repository of its own with all files of this one as they are now, committed, as `launcher/submit.py` needs it."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)
    return folder


def checkpoint_at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"images-{step * BATCH:012d}"


def assert_same_curve(actual: Path, expected: Path) -> None:
    """Every number of every step agrees to 1e-5."""
    curves = numbers_of(expected), numbers_of(actual)
    assert [step["step"] for step in curves[0]] == list(range(1, STEPS + 1))
    for want, got in zip(*curves, strict=True):
        _assert_close(got, want, f"step {want['step']}")


def assert_same_losses(actual: Path, expected: Path) -> None:
    """What no number of ranks changes agrees to 1e-5: the losses, the gradient norm and the learning rate of every step."""
    curves = [[{key: step[key] for key in LAW} for step in numbers_of(run)] for run in (expected, actual)]
    assert [step["step"] for step in curves[0]] == list(range(1, STEPS + 1))
    for want, got in zip(*curves, strict=True):
        _assert_close(got, want, f"step {want['step']}")


def assert_same_run(actual: Path, expected: Path) -> None:
    """Curve and final state agree bit for bit."""
    assert numbers_of(actual) == numbers_of(expected)
    for kind in STATE:
        want, got = tensors_of(expected, kind), tensors_of(actual, kind)
        assert want.keys() == got.keys() and want
        assert not [name for name in want if not torch.equal(want[name], got[name])], kind


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those the system hands out."""
    found: list[int] = []
    for port in random.sample(range(15_000, 30_000), 400):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"{count} free ports were not found")


def wait_until(holds: Callable[[], object], seconds: float, what: str, logs: Callable[[], str] = str) -> None:
    """Return when `holds()`; fail with the logs when it does not within the time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{logs()}"
        time.sleep(0.1)


def _assert_close(actual: Any, expected: Any, where: str) -> None:
    """The same shape of nested lists and mappings, with numbers that agree; null stays null."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            _assert_close(actual[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        for place, (got, want) in enumerate(zip(actual, expected, strict=True)):
            _assert_close(got, want, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, rel_tol=1e-5, abs_tol=1e-5), f"{where}: {actual} for {expected}"
    else:
        assert actual == expected, where
