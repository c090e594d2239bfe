"""One run of the experiment: the trainer's own run directory, and beside it what the training cost in CPU time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.variants import CONFIG, VARIANTS, Scale
from sdit.config import Config
from sdit.configfile import load_config
from sdit.contracts import Batch
from sdit.diffusion import build_objective
from sdit.errors import ExitCode
from sdit.model import build_model, solve_assignment
from sdit.observe.metrics_file import MetricsFile, read_metrics
from sdit.observe.progress import Progress
from sdit.parallel.comm import Comm
from sdit.train.build import open_trainer
from sdit.train.clock import Clock
from sdit.train.events import Observer
from sdit.train.module import TrainModule

DEEPSPEED = {"zero_optimization": {"stage": 0}}
CPU_FILE = "cpu.jsonl"


class CpuClock(Observer):
    """Appends to RUN/cpu.jsonl how many steps were taken and how much CPU time they took, in all threads.

    Wall-clock means nothing on a shared machine. Steps around a checkpoint or a held-out loss are not counted, nor the first.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / CPU_FILE
        self._before: float | None = None
        self._steps, self._seconds = 0, 0.0

    def on_step(self, clock: Clock, metrics: dict[str, Any], logged: bool) -> None:
        now = time.process_time()
        if self._before is not None and metrics["pause_seconds"] == 0 and "validation_loss" not in metrics:
            self._steps += 1
            self._seconds += now - self._before
        if logged and self._steps:
            record = {"images_seen": clock.images_seen, "steps": self._steps, "cpu_seconds": self._seconds}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._steps, self._seconds = 0, 0.0
        self._before = time.process_time()


def run_config(scale: Scale, variant: str, seed: int, work: Path, run_dir: Path, *more: str) -> Config:
    """The config of one run; all variants of a seed share initial weights, data order, timesteps and noise."""
    places = (f"data.path={work}/data/train", f"validation.path={work}/data/test", f"run_dir={run_dir}", f"seed={seed}")
    return load_config(CONFIG, [*scale.overrides, *VARIANTS[variant].overrides, *places, *more])


def train(config: Config, comm: Comm) -> ExitCode:
    """Train to the end, from wherever the run stands."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    observers = [MetricsFile(run_dir), CpuClock(run_dir), Progress()]
    try:
        with open_trainer(config, DEEPSPEED, "experiment", comm, observers) as trainer:
            return trainer.run()
    finally:
        for observer in observers:
            observer.close()


def held_out_curve(run_dir: Path) -> list[dict[str, Any]]:
    """The held-out losses of a run, with the images seen."""
    keys = ("images_seen", "validation_loss", "validation_mse", "validation_loss_by_timestep", "validation_images")
    return [{key: record[key] for key in keys} for record in read_metrics(run_dir) if "validation_loss" in record]


def is_trained(config: Config) -> bool:
    """Whether the run has come to its end."""
    run_dir = Path(config.run_dir)
    curve = held_out_curve(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    return bool(curve) and curve[-1]["images_seen"] == config.train.total_images


def cpu_seconds_per_image(run_dir: Path, global_batch: int) -> tuple[float, int]:
    """CPU seconds that training took for an image, and the number of steps this is the mean of."""
    records = [json.loads(line) for line in (run_dir / CPU_FILE).read_text(encoding="utf-8").splitlines()]
    steps = sum(record["steps"] for record in records)
    return sum(record["cpu_seconds"] for record in records) / (steps * global_batch), steps


def flops_per_image(config: Config) -> float:
    """Floating-point operations of matrix products, forward and backward, for one training image."""
    images, model = config.train.global_batch, build_model(config.model, seed=0)
    module = TrainModule(model, build_objective(config.diffusion, config.model.timesteps), config.prior.weight, 0.0)
    shape = (images, config.model.channels, config.model.input_size, config.model.input_size)
    t = torch.arange(images) * config.model.timesteps // images
    batch = Batch(torch.arange(images), torch.zeros(shape), torch.zeros(shape), t, torch.zeros_like(t))
    assignment = solve_assignment(model.all_gate_probs(), config.model) if config.prior.weight else None
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(batch, assignment, None).total.backward()
    return counter.get_total_flops() / images
