#!/usr/bin/env python3
"""Check sdit on one GPU in about ten minutes: numbers, host waits, speed, memory, layouts, faults.

usage: python benchmarks/gpu_check.py --out DIR [--minutes 8] [--stages machine waits ...]
       python benchmarks/gpu_check.py --out DIR --device cpu --tiny

Each stage is a process of its own with a limit, so that one that fails or hangs costs the others nothing. The stages run in the
order of their value. After each one DIR/STAGE.json and DIR/table.md are written. Nothing is downloaded. It needs sdit's packages,
Python 3.11 or newer and torch 2.8 or newer. With --device cpu --tiny
the stages test their own code in a minute, and measure nothing. The exit status is 1 if a stage fails or misses a limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

STAGES = Path(__file__).resolve().parent / "gpu"
SHARES = {  # of the time, in seconds of 8 minutes
    "machine": 25,
    "waits": 40,
    "throughput": 150,
    "layouts": 75,
    "numerics": 35,
    "training": 120,
    "profile": 50,
    "kernels": 40,
    "loader": 25,
    "state": 40,
}
SHARES_MINUTES = 8
PYTHON = (3, 11)
TINY_SECONDS = 120  # the limit of a stage that measures nothing


class Result(NamedTuple):
    """What a stage left. `problem` is empty if it ended by itself without an error."""

    stage: str
    rows: list[dict[str, Any]]
    seconds: float
    problem: str


def run_stage(stage: str, options: argparse.Namespace, limit_seconds: float) -> Result:
    """Run a stage, and end it with all its processes at the limit."""
    out = options.out / f"{stage}.json"
    out.unlink(missing_ok=True)
    # On a CPU the smallest sizes gain nothing from threads, which wait for each other on a machine with other load.
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if options.tiny else None
    command = [sys.executable, str(STAGES), stage, "--device", options.device, "--out", str(out)]
    started = time.monotonic()
    with (options.out / f"{stage}.log").open("w") as log:
        process = subprocess.Popen(
            command + ["--tiny"] * options.tiny, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        )  # fmt: skip
        try:
            code = process.wait(limit_seconds)
            problem = f"exit status {code}; see {stage}.log" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"ended after {limit_seconds:.0f} s; see {stage}.log"
        finally:
            if process.poll() is None or not out.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return Result(stage, rows, time.monotonic() - started, problem)


def as_table(results: list[Result]) -> str:
    """The rows of all stages in Markdown."""
    lines = ["| stage | what | value | unit | wanted | |", "|---|---|---|---|---|---|"]
    for result in results:
        for row in result.rows:
            value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g}"
            kept = {True: "yes", False: "**no**", None: ""}[row["is_good"]]
            lines.append(f"| {result.stage} | {row['name']} | {value} | {row['unit']} | {row['wanted']} | {kept} |")
        if result.problem:
            lines.append(f"| {result.stage} | the stage | {result.problem} | | | **no** |")
        lines.append(f"| {result.stage} | duration | {result.seconds:.0f} | s | | |")
    return "\n".join(lines) + "\n"


def is_good(result: Result) -> bool:
    return not result.problem and all(row["is_good"] is not False for row in result.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=SHARES_MINUTES, help="time for all stages")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: test the stages, measure nothing")
    parser.add_argument("--stages", nargs="+", choices=SHARES, default=list(SHARES), help="what is run")
    options = parser.parse_args()
    if sys.version_info < PYTHON:
        parser.error(f"Python {sys.version_info[0]}.{sys.version_info[1]}; sdit needs 3.11 or newer")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results: list[Result] = []
    for stage in options.stages:
        share = SHARES[stage] * options.minutes / SHARES_MINUTES
        limit = TINY_SECONDS if options.tiny else min(share, deadline - time.monotonic())
        results.append(run_stage(stage, options, limit) if limit > 0 else Result(stage, [], 0.0, "no time was left"))
        (options.out / "table.md").write_text(as_table(results))
        done = results[-1]
        print(
            f"{stage}: {done.seconds:.0f} s, {'good' if is_good(done) else done.problem or 'misses a limit'}",
            flush=True,
        )
    print((options.out / "table.md").read_text())
    sys.exit(0 if all(map(is_good, results)) else 1)


if __name__ == "__main__":
    main()
