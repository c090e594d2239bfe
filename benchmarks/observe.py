#!/usr/bin/env python3
"""What watching a run costs: one run in which blocks of steps with all observation take turns with blocks without any.

The model has S/8's shape (12 blocks of width 384, 16 tokens) and runs on one CPU core. With observation: the metrics page,
metrics.jsonl, progress lines, the rank's log, TensorBoard where it is installed, and what a logged step computes (routing
report, slow ranks). Without: none of these. A block with it is compared with the mean of its two neighbours, so that other load
on the machine falls on both alike. Scrapes are answered by another process and are given as its CPU time. Sample grids and
routing maps are no part of a step; they are made at intervals of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from meter import Meter
from prometheus_client import CollectorRegistry, generate_latest

from sdit.clock import Clock
from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.metrics.collector import SharedMetricsCollector
from sdit.metrics.shared_file import RankStatus, SharedMetricsFile
from sdit.observe.metrics import PrometheusObserver
from sdit.observe.observers import build_observers
from sdit.train.events import Observer, Observers
from sdit.train.loop import Trainer
from sdit.train.record import StepRecord
from sdit.train.setup import open_trainer

ROOT = Path(__file__).resolve().parent.parent
SCRAPE_SECONDS = 15.0


NEVER = 1 << 40  # steps between two logged steps


class Turns(Observer):
    """Passes on to the observers in every other block of steps, and times the steps and what the observers take."""

    def __init__(self, observers: Observers, block: int) -> None:
        self._observers, self._block = observers, block
        self.trainer: Trainer | None = None
        self.report: Meter | None = None
        self._log_every_steps = (NEVER, NEVER)  # with observation, without
        self._last = (0.0, 0.0)
        self.blocks: list[
            tuple[float, float]
        ] = []  # seconds and CPU seconds of a block: with observation, without, with ...
        self.told_seconds, self.told_steps = 0.0, 0

    def attach(self, trainer: Trainer) -> None:
        self._log_every_steps = (trainer.step.log_every_steps, NEVER)
        self.report = Meter(trainer.context.experts, ("statistics",))
        self.trainer, self._last = trainer, _clocks()

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self._observers.on_start(clock, total_images, message)

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        """The time from the end of one call to the end of the next is one step and all that watched it."""
        assert self.trainer is not None
        is_on = (clock.steps - 1) // self._block % 2 == 0
        if is_on:
            started = time.perf_counter()
            self._observers.on_step(clock, record)
            self.told_seconds += time.perf_counter() - started
            self.told_steps += 1
        if clock.steps % self._block == 0:
            now = _clocks()
            self.blocks.append((now[0] - self._last[0], now[1] - self._last[1]))
            self._last = now
            self.trainer.step.log_every_steps = self._log_every_steps[clock.steps // self._block % 2]

    def close(self) -> None:
        self._observers.close()


def _clocks() -> tuple[float, float]:
    """The clock on the wall, and the CPU time of this process, which other load on the machine disturbs less."""
    return time.perf_counter(), time.process_time()


def measure(options: argparse.Namespace, folder: Path, page: SharedMetricsFile) -> Turns:
    """One run of the given number of pairs of blocks."""
    has_tensorboard = "true" if importlib.util.find_spec("tensorboardX") else "false"
    overrides = [
        "model.depth=12", "model.width=384", "model.heads=6", "model.patch_size=2", "model.size=null", "train.images=null",
        f"train.steps={2 * options.block * (options.pairs + 1)}", f"train.global_batch={options.batch}",
        f"train.log_every_steps={options.block}", "parallel.threads=1", "parallel.expert=1", "sample.every_images=null",
        "checkpoint.every_images=null", "checkpoint.every_steps=null", "sample.steps=1", "sample.images_per_class=1",
        f"observe.tensorboard={has_tensorboard}", f"run_dir={folder}",
    ]  # fmt: skip
    config = load_config(str(ROOT / "configs" / "digits.yaml"), overrides)
    info = find_rank(os.environ)
    observers = build_observers(config, folder, info, PrometheusObserver(config, folder, info, page.path))
    turns = Turns(observers, options.block)
    run = resolve_run(config, {"zero_optimization": {"stage": 1}}, "benchmark", info.world, info.local_world)
    with (
        Comm(info) as comm,
        open_trainer(run, comm, Observers([turns])) as trainer,
    ):
        turns.attach(trainer)
        trainer.run()
    turns.close()
    return turns


def scrape_cpu_seconds(page: SharedMetricsFile) -> float:
    """CPU time of answering one scrape, without the socket."""
    registry = CollectorRegistry()
    registry.register(SharedMetricsCollector(lambda: [page.path], lambda: 0.0))
    return median_cpu_seconds(lambda: generate_latest(registry))


def median_cpu_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(50):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks compared")
    parser.add_argument("--block", type=int, default=10, help="steps in a block, of which one is logged")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = SharedMetricsFile.create(f"benchmark-{os.getpid()}")
    try:
        now = time.monotonic()
        page.write_status(RankStatus(0, True, 0, "training", 180.0, now, now, now))
        with tempfile.TemporaryDirectory() as folder:
            turns = measure(options, Path(folder), page)
        report(turns, options.block, scrape_cpu_seconds(page))
    finally:
        page.close()
        page.path.unlink()


def report(turns: Turns, block: int, scrape_seconds: float) -> None:
    """Print the ratios; the first pair warms up."""
    watched, alone = turns.blocks[2::2], turns.blocks[1::2]
    step = statistics.median(seconds for seconds, _ in alone) / block
    assert turns.report is not None
    told = (turns.told_seconds + turns.report.seconds) / turns.told_steps
    print(f"{len(watched)} pairs of {block} steps of {1000 * step:.0f} ms")
    print("| | median | quartiles |\n|---|---|---|")
    for name, clock in (("step time", 0), ("CPU time of a step", 1)):
        ratios = [
            2 * seconds[clock] / (before[clock] + after[clock])
            for seconds, before, after in zip(watched, alone, alone[1:], strict=False)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} with all observation / without | {middle:.4f} | {low:.4f}-{high:.4f} |")
    print(f"| time in the observers and the routing report / step time | {100 * told / step:.3f} % | |")
    print(
        f"| CPU time of a scrape every {SCRAPE_SECONDS:.0f} s / wall clock | {100 * scrape_seconds / SCRAPE_SECONDS:.3f} % | |"
    )


if __name__ == "__main__":
    main()
