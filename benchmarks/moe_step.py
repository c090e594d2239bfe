"""Whole training steps of Switch-DiT-S/2 with EP = 1 and EP = P, for `moe.py`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from train_steps import training_step

from sdit.config import Config, DataConfig, ExpertsConfig, ModelConfig, ParallelConfig, TrainConfig, resolve_run
from sdit.data.encoders import png_encoder
from sdit.data.index import DatasetFacts
from sdit.data.prepare import prepare
from sdit.data.sources import ArraySource
from sdit.distributed.comm import Comm
from sdit.train.record import StepRecord
from sdit.train.setup import open_trainer

EXPERTS, PICTURES, CLASSES = 4, 64, 10
ALONE = "EP = 1"


def layouts(ranks: int) -> dict[str, ParallelConfig]:
    """What is compared, by name; everything that is not said is by default."""
    sharded = {
        "auto": {},
        "auto, no overlap": {"overlap": False},
        "tokens, no overlap": {"exchange": "tokens", "overlap": False},
        "tokens": {"exchange": "tokens"},
    }
    alone = ParallelConfig(expert=1, threads=1)
    return {ALONE: alone} | {
        f"EP = {ranks}, {name}": ParallelConfig(expert=ranks, threads=1, **settings)  # type: ignore[arg-type]
        for name, settings in sharded.items()
    }


@dataclass(frozen=True)
class Record:
    """One step of all ranks: `seconds` of the slowest, `cpu_seconds` of all together, and what the experts cost on the wire."""

    seconds: float
    cpu_seconds: float
    wait_seconds: float
    sent_bytes: float


def compare_whole_steps(comm: Comm, batch: int, rounds: int) -> None:
    """Print the table: the system's own training step, every default on, ZeRO 1; the layouts take turns."""
    folder = comm.from_first(tempfile.mkdtemp() if comm.is_first else "")
    if comm.is_first:
        write_pictures(Path(folder) / "data")
    comm.barrier()
    records: dict[str, list[Record]] = {}
    with ExitStack() as stack:
        steps = {}
        for number, (name, parallel) in enumerate(layouts(comm.world).items()):
            config = run_config(f"{folder}/data", f"{folder}/run-{number}", parallel, batch * comm.world)
            zero = {"zero_optimization": {"stage": 1}}
            run = resolve_run(config, zero, "benchmark", comm.world, comm.info.local_world)
            steps[name] = training_step(stack.enter_context(open_trainer(run, comm)))
        for _ in range(rounds + 2):
            for name, step in steps.items():
                records.setdefault(name, []).append(timed(step, comm))
    if comm.is_first:
        print(
            f"Switch-DiT-S/2, M = {EXPERTS}, {comm.world} ranks x {batch} images, ZeRO 1, median of {rounds} steps in turn"
        )
        show({name: series[2:] for name, series in records.items()})  # the first step places the experts


def timed(step: Callable[[], StepRecord], comm: Comm) -> Record:
    """Take a step that begins on all ranks together."""
    comm.barrier()
    started, used = time.perf_counter(), time.process_time()
    record = step()
    spent = torch.tensor([time.perf_counter() - started, time.process_time() - used], dtype=torch.float64)
    seconds, cpu = zip(*comm.interleave(spent[None]).tolist(), strict=True)
    return Record(max(seconds), sum(cpu), record.exchange_wait_seconds or 0.0, record.exchange_bytes or 0.0)


def show(records: dict[str, list[Record]]) -> None:
    """Print medians, and of ratios the median over rounds: what else the machine does falls on both sides."""
    print(
        "| layout | s per step | of EP = 1 | CPU s, all ranks | of EP = 1 | s waiting for experts | MB sent for experts |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, series in records.items():
        pairs = list(zip(series, records[ALONE], strict=True))
        ratio = statistics.median(own.seconds / base.seconds for own, base in pairs)
        cpu_ratio = statistics.median(own.cpu_seconds / base.cpu_seconds for own, base in pairs)
        seconds, cpu, wait = (
            statistics.median(getattr(record, key) for record in series)
            for key in ("seconds", "cpu_seconds", "wait_seconds")
        )
        sent = series[-1].sent_bytes / 1e6
        print(f"| {name} | {seconds:.2f} | {ratio:.3f} | {cpu:.2f} | {cpu_ratio:.3f} | {wait:.2f} | {sent:.1f} |")


def run_config(data: str, run_dir: str, parallel: ParallelConfig, global_batch: int) -> Config:
    """Switch-DiT-S/2 on pictures of 32 x 32 (256 tokens)."""
    return Config(
        model=ModelConfig(size="S/2", channels=3, classes=CLASSES, experts=ExpertsConfig(count=EXPERTS)),
        data=DataConfig(source="shards", path=data, streams=1),
        parallel=parallel,
        train=TrainConfig(steps=1000, global_batch=global_batch),
        run_dir=run_dir,
    )


def write_pictures(folder: Path) -> None:
    """Shards of random pictures."""
    generator = np.random.default_rng(0)
    facts = DatasetFacts(kind="images", total=PICTURES, channels=3, size=32, classes=CLASSES)
    pixels = generator.integers(0, 256, (PICTURES, 3, 32, 32), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, PICTURES)
    prepare(ArraySource(facts, {"source": "noise"}, pixels, labels), png_encoder(), folder)
