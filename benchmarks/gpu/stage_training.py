"""The command of the README on the device: precisions and ZeRO stages against a CPU run, a killed run, samples, an export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rows import Machine, Row, limited

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4  # of the difference of two float32 losses over the loss, after at most STEPS steps
BF16_LIMIT = 0.2
STEPS, KILLED_AFTER_STEPS = 40, 20
RUN_SECONDS = 120


def measure(machine: Machine) -> list[Row]:
    """Losses of each way to train, then what follows training."""
    steps = 3 if machine.is_tiny else STEPS
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure_in(Path(folder), machine, steps))
    return rows


def measure_in(folder: Path, machine: Machine, steps: int) -> Iterator[Row]:
    """The rows, with runs in `folder`."""
    stages = ("zero1",) if machine.is_tiny else ("zero1", "zero0", "zero2", "zero2_offload")
    for stage in stages:
        run(folder / stage, machine.device.type, stage, steps)
    if machine.is_cuda:
        run(folder / "cpu", "cpu", "zero1", steps)
        for stage in stages:
            yield limited(f"{stage}, fp32: loss against a CPU", difference(folder, stage, "cpu"), "", LIMIT)
        for stage in stages:
            run(folder / f"{stage}-bf16", machine.device.type, stage, steps, "train.precision=bf16")
            error = difference(folder, f"{stage}-bf16", stage)
            yield limited(f"{stage}, bf16: loss against fp32", error, "", BF16_LIMIT)
    if not machine.is_tiny:
        yield from killed(folder, machine, steps)
    yield from after(folder / "zero1")


def killed(folder: Path, machine: Machine, steps: int) -> Iterator[Row]:
    """A run that is killed and resumed, and one that is not, both with deterministic algorithms."""
    keys = ("train.deterministic=true", "checkpoint.every_steps=10", "checkpoint.asynchronous=true")
    run(folder / "whole", machine.device.type, "zero1", steps, *keys)
    command = train_command(folder / "killed", machine.device.type, "zero1", steps, "supervise.enabled=false", *keys)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + RUN_SECONDS
    while process.poll() is None and len(losses(folder / "killed")) < KILLED_AFTER_STEPS:
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{KILLED_AFTER_STEPS} steps took more than {RUN_SECONDS} s")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder / "killed", machine.device.type, "zero1", steps, *keys)
    yield limited(
        "a killed and resumed run: loss against an undisturbed run", difference(folder, "killed", "whole"), "", 0
    )


def after(run_dir: Path) -> Iterator[Row]:
    """Samples of the run and an export."""
    for name, words in (("sample", ["--steps", "2", "--images", "4"]), ("export", [])):
        out = run_dir / ("model.safetensors" if name == "export" else "samples.png")
        started = time.perf_counter()
        command = [sys.executable, "-m", "sdit.cli", name, "--checkpoint", str(run_dir), "--out", str(out), *words]
        call(command)
        yield Row(f"sdit {name}", time.perf_counter() - started, "s, with the start")


def run(run_dir: Path, device: str, stage: str, steps: int, *keys: str) -> None:
    """Train the digits to the end."""
    call(train_command(run_dir, device, stage, steps, *keys))


def train_command(run_dir: Path, device: str, stage: str, steps: int, *keys: str) -> list[str]:
    """The command of one rank."""
    return [
        sys.executable, str(ROOT / "launcher" / "train.py"), "--ds_config", str(ROOT / f"configs/deepspeed/{stage}.json"),
        "--run-dir", str(run_dir), f"train.steps={steps}", "train.log_every_steps=1", "sample.every_images=null",
        "sample.steps=2", "observe.metrics_port=null", f"parallel.device={device}", *keys,
    ]  # fmt: skip


def call(command: list[str]) -> None:
    """Run a command. Raises: RuntimeError: with its last lines, if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr[-600:]}")


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each logged step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records}


def difference(folder: Path, name: str, other: str) -> float:
    """The largest relative difference of the losses of two runs."""
    found, exact = losses(folder / name), losses(folder / other)
    if found.keys() != exact.keys():
        raise RuntimeError(f"{name} logged steps {sorted(found)}, {other} {sorted(exact)}")
    return max(abs(found[step] - exact[step]) / exact[step] for step in exact)
