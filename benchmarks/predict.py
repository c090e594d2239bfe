#!/usr/bin/env python3
"""Predicted and measured seconds of training steps on this machine.

    python benchmarks/predict.py --rounds 3 --out predict.md

For each number of ranks and in each round, `sdit doctor --write` measures a hardware file, then the same number of ranks trains
a few steps of each config, then the planner predicts the step from the file. Doctor and training take turns, so that other
load on the machine affects both. The table has the medians over the rounds. Ranks beyond the cores share them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ranks import start_ranks
from train_steps import training_step

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.patch_size=1", "model.heads=4", "train.steps=1000", "train.log_every_steps=1000", "parallel.threads=1"]
CONFIGS = {  # on 8 x 8 digits: 64 tokens
    "DiT, D = 256": ["model.variant=dit", "model.depth=6", "model.width=256", "train.global_batch=32"],
    "Switch-DiT, M = 4, linear, D = 256": ["model.depth=6", "model.width=256", "train.global_batch=32"],
    "Switch-DiT, M = 8, mlp, D = 128": [
        "model.depth=6", "model.width=128", "model.experts.count=8", "model.experts.kind=mlp", "train.global_batch=64",
    ],
}  # fmt: skip
DEEPSPEED = {"zero_optimization": {"stage": 1}}
WARM_STEPS = 2


def train(out: Path, steps: int) -> None:
    """As one rank, train each config and write the median seconds of a step."""
    import torch

    from sdit.config import load_config, resolve_run
    from sdit.distributed.comm import Comm, find_rank
    from sdit.train.setup import open_trainer

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder, Comm(find_rank(os.environ)) as comm:
        shared = comm.from_first(folder)
        for number, (name, overrides) in enumerate(CONFIGS.items()):
            words = [*SMALL, *overrides, f"run_dir={shared}/{number}"]
            config = load_config(ROOT / "configs" / "digits.yaml", words)
            run = resolve_run(config, DEEPSPEED, "predict", comm.world, comm.info.local_world)
            with open_trainer(run, comm) as trainer:
                step = training_step(trainer)
                taken = []
                for _ in range(WARM_STEPS + steps):
                    started = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - started)
                found[name] = statistics.median(taken[WARM_STEPS:])
        comm.barrier()
        if comm.is_first:
            out.write_text(json.dumps(found), encoding="utf-8")


def predict(hardware_file: Path, world: int) -> dict[str, dict[str, float]]:
    """Return the parts of a step of each config in seconds."""
    from sdit.config import load_config
    from sdit.planner.hardware import read_hardware
    from sdit.planner.layout import plan_job
    from sdit.planner.step_time import predict_step
    from sdit.planner.traffic import plan_exchange

    hardware, found = read_hardware(hardware_file), {}
    for name, overrides in CONFIGS.items():
        config = load_config(ROOT / "configs" / "digits.yaml", [*SMALL, *overrides])
        job = plan_job(config, DEEPSPEED, "predict", world, world)
        found[name] = predict_step(job, plan_exchange(job, "random", hardware.device.kind), hardware).parts
    return found


def measure(world: int, steps: int, folder: Path) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the predicted parts and the measured seconds of each config on `world` ranks."""
    hardware, out = folder / "hardware.yaml", folder / "steps.json"
    doctor = [
        str(ROOT / "launcher" / "doctor.py"),
        "--write",
        str(hardware),
        "--threads",
        "1",
        "--run-dir",
        str(folder),
    ]
    worker = [str(Path(__file__).resolve()), "--train", str(out), "--steps", str(steps)]
    for command in ([*doctor, "--timeout-seconds", "300"], worker):
        if status := start_ranks(world, command):
            sys.exit(f"error: {command[0]} ended with status {status}")
    return predict(hardware, world), json.loads(out.read_text(encoding="utf-8"))


def table(found: dict[tuple[str, int], list[tuple[dict[str, float], float]]]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| config | ranks | measured, ms | predicted, ms | predicted / measured | per round | largest parts |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, world), rounds in found.items():
        measured = statistics.median(seconds for _, seconds in rounds)
        predicted = statistics.median(sum(parts.values()) for parts, _ in rounds)
        ratios = ", ".join(f"{sum(parts.values()) / seconds:.2f}" for parts, seconds in rounds)
        parts = {part: statistics.median(row[part] for row, _ in rounds) for part in rounds[0][0]}
        largest = sorted(parts, key=lambda part: -parts[part])[:3]
        shown = ", ".join(f"{part} {1e3 * parts[part]:.0f}" for part in largest)
        figures = f"{1e3 * measured:.0f} | {1e3 * predicted:.0f} | {predicted / measured:.2f} | {ratios} | {shown}"
        lines.append(f"| {name} | {world} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--rounds", type=int, default=3, help="turns of doctor and training for each number of ranks")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each config in a round")
    parser.add_argument("--out", type=Path, help="file for the Markdown table (default: print it only)")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(options.train, options.steps)
    found: dict[tuple[str, int], list[Any]] = defaultdict(list)
    for _ in range(options.rounds):
        for world in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                predicted, measured = measure(world, options.steps, Path(folder))
            for name in CONFIGS:
                found[name, world].append((predicted[name], measured[name]))
                shown = {part: round(1e3 * seconds, 1) for part, seconds in predicted[name].items()}
                print(
                    f"{name}, {world} ranks: measured {1e3 * measured[name]:.0f} ms, predicted {shown}", file=sys.stderr
                )
    lines = table(dict(sorted(found.items())))
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
