"""Measures the work of a training step that does not grow with the model: host, launches, the loader, one all-reduce."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import torch

from sdit.config import Config, DataConfig, ModelConfig, TrainConfig, resolve_run
from sdit.distributed.comm import Comm
from sdit.distributed.fabric import settle
from sdit.planner.hardware import Host
from sdit.train.setup import open_trainer

WARM_STEPS, STEPS = 2, 8
ASSUMED_RESTART_SECONDS, ASSUMED_MICROSECONDS_PER_RANK = 300.0, 0.0  # of the hardware files that come with sdit


def measure_host(comm: Comm, folder: Path, threads: int | None) -> Host:
    """Return the host's figures. A step is one of a model so small that its arithmetic does not count.

    Raises: OSError: if no run can be written in the folder.
    """
    run_dir = Path(comm.from_first(str(folder / f".sdit-doctor-run-{os.getpid()}")))
    try:
        seconds = _step_seconds(comm, run_dir, threads)
    finally:
        comm.barrier()
        if comm.is_first:
            shutil.rmtree(run_dir, ignore_errors=True)
    return Host(
        step_milliseconds=1e3 * seconds,
        step_microseconds_per_rank=ASSUMED_MICROSECONDS_PER_RANK,
        restart_seconds=ASSUMED_RESTART_SECONDS,
    )


def _step_seconds(comm: Comm, run_dir: Path, threads: int | None) -> float:
    """Return the median of the seconds of the slowest rank in each step."""
    model = ModelConfig(variant="dit", depth=1, width=16, heads=1, patch_size=4, input_size=8, channels=1, classes=10)
    train = TrainConfig(steps=WARM_STEPS + STEPS, global_batch=comm.world, log_every_steps=1000)
    config = Config(model=model, data=DataConfig(source="digits"), train=train, run_dir=str(run_dir))
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"threads": threads})})
    run = resolve_run(config, {"zero_optimization": {"stage": 1}}, "sdit doctor", comm.world, comm.info.local_world)
    taken = []
    with open_trainer(run, comm) as trainer:
        batches, state = iter(trainer.batches), trainer.context.state
        for _ in range(WARM_STEPS + STEPS):
            started = time.perf_counter()
            micro_batches, span = next(batches), state.next_step()
            trainer.step.run(micro_batches, span)
            state.clock = span.clock
            settle(comm.device)
            taken.append(time.perf_counter() - started)
    slowest = comm.largest(torch.tensor(taken[WARM_STEPS:], dtype=torch.float64, device=comm.device))
    return statistics.median(slowest.tolist())
