#!/usr/bin/env python3
"""Draw the figure of docs/planning.md next to this script: predicted step time and goodput. No run is needed.

XL/2 with k = 2 linear experts, 32 images per GPU at any number of GPUs, bf16, configs/deepspeed/zero1_gpu.json, EP within a
node, and the figures of configs/hardware/h100-ib.yaml.

usage: python docs/figures/planner.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from expert_parallelism import COLOURS, STYLE, save

from sdit.config import load_config, read_deepspeed_json
from sdit.planner.hardware import read_hardware
from sdit.planner.layout import plan_job
from sdit.planner.simulation import Simulation, simulate
from sdit.planner.step_time import StepTime
from sdit.planner.traffic import plan_exchange

matplotlib.use("svg")
import matplotlib.pyplot as plt

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPUS = [2**power for power in range(3, 13)]
PER_NODE, IMAGES_PER_GPU = 8, 32
EXPERTS = (3, 16, 64)


def main() -> None:
    """Write the figure as an SVG file, and print its numbers."""
    plt.rcParams.update(STYLE)  # type: ignore[arg-type]
    found = {count: predictions(count) for count in EXPERTS}
    save("planner", draw(found))
    print("| GPUs | M | step, ms | of it: arithmetic | exchange | gradients | goodput | best interval, s |")
    print("|---|---|---|---|---|---|---|---|")
    for count, runs in found.items():
        for gpus, run in zip(GPUS, runs, strict=True):
            if gpus in (8, 64, 512, 4096):
                print(row(gpus, count, run.step, run))


def row(gpus: int, count: int, step: StepTime, run: Simulation) -> str:
    """Return a line of the table."""
    exchange = step.imbalance + step.exchange_inside + step.exchange_between
    times = [step.total, step.compute, exchange, step.gradients]
    shown = " | ".join(f"{1e3 * seconds:.1f}" for seconds in times)
    return f"| {gpus} | {count} | {shown} | {run.reliability.goodput:.4f} | {run.reliability.interval_seconds:.0f} |"


def predictions(count: int) -> list[Simulation]:
    """Return the predictions of XL/2 with M experts. The exchange of a group does not depend on the number of groups."""
    hardware = read_hardware(CONFIGS / "hardware" / "h100-ib.yaml")
    source = CONFIGS / "deepspeed" / "zero1_gpu.json"
    exchange, runs = None, []
    for gpus in GPUS:
        overrides = [f"model.experts.count={count}", f"train.global_batch={IMAGES_PER_GPU * gpus}"]
        config = load_config(CONFIGS / "imagenet256_xl2.yaml", overrides)
        job = plan_job(config, read_deepspeed_json(source), str(source), gpus, PER_NODE)
        exchange = exchange or plan_exchange(job, "prior")
        runs.append(simulate(job, exchange, hardware))
    return runs


def draw(found: dict[int, list[Simulation]]) -> Any:
    """Draw step time and goodput over the number of GPUs."""
    figure, (times, kept) = plt.subplots(1, 2, figsize=(8, 3.2))
    for (count, runs), colour, marker in zip(found.items(), COLOURS, "os^", strict=False):
        line = {"color": colour, "marker": marker, "markersize": 3.5, "label": f"M = {count}"}
        times.plot(GPUS, [1e3 * run.step.total for run in runs], **line)
        kept.plot(GPUS, [run.reliability.goodput for run in runs], **line)
    for axis in (times, kept):
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS[::3], [f"{gpus:,}" for gpus in GPUS[::3]])
        axis.set_xlabel("GPUs")
    times.set_ylim(bottom=0)
    times.set_ylabel("ms per step")
    kept.set_ylabel("goodput at the best interval")
    times.legend(frameon=False)
    figure.suptitle("predicted, not measured: XL/2, 32 images per GPU, H100 nodes with 400 Gb/s per GPU", fontsize=9)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
