"""One run of the experiment: the trainer's run directory, and what the training cost in time."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.studies import Study
from sdit.clock import Clock
from sdit.config import Config, load_config, resolve_run
from sdit.distributed.comm import Comm
from sdit.errors import ExitCode
from sdit.observe.metrics_file import MetricsFile, read_metrics, read_records
from sdit.observe.progress import Progress
from sdit.supervise.heartbeat import Heartbeat
from sdit.supervise.lock import RunLock
from sdit.supervise.worker import WorkerContext
from sdit.train.events import Observer, Observers
from sdit.train.record import StepRecord
from sdit.train.setup import open_trainer

DEEPSPEED = {"zero_optimization": {"stage": 0}}
TIMES_FILE = "times.jsonl"


class StepTimer(Observer):
    """Appends to RUN/times.jsonl how many steps were taken and how long they took, by the wall and in CPU time of all threads.

    Steps around a checkpoint or a held-out loss are not counted, nor the first of a process.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / TIMES_FILE
        self._before: tuple[float, float] | None = None
        self._steps, self._wall_seconds, self._cpu_seconds = 0, 0.0, 0.0

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._before is not None and record.pause_seconds == 0 and record.validation_loss is None:
            self._steps += 1
            self._wall_seconds += now[0] - self._before[0]
            self._cpu_seconds += now[1] - self._before[1]
        if record.logged and self._steps:
            seconds = {"wall_seconds": self._wall_seconds, "cpu_seconds": self._cpu_seconds}
            line = {"images_seen": clock.images_seen, "steps": self._steps, **seconds}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._steps, self._wall_seconds, self._cpu_seconds = 0, 0.0, 0.0
        self._before = (time.perf_counter(), time.process_time())


class Turn(Observer):
    """Asks the run to stop when it has seen `until` images: the next model's turn."""

    def __init__(self, heartbeat: Heartbeat, until: int) -> None:
        self._heartbeat, self._until = heartbeat, until

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if clock.images_seen >= self._until:
            self._heartbeat.request_stop()


def run_config(study: Study, variant: str, seed: int, work: Path, run_dir: Path, *more: str) -> Config:
    """The config of one run; all variants of a seed share initial weights, data order, timesteps and noise."""
    places = (f"data.path={work}/data/train", f"validation.path={work}/data/test", f"run_dir={run_dir}", f"seed={seed}")
    return load_config(study.config, [*study.overrides, *study.variants[variant].overrides, *places, *more])


def train(config: Config, comm: Comm, until: int | None = None) -> ExitCode:
    """Train from wherever the run stands, to its end or for a turn: to the step after `until` images.

    DONE when the run or the turn is over, REQUEUE where somebody asked this process to stop.

    Raises: ConfigError when another process trains this run.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    worker = WorkerContext(Heartbeat())
    turn = Turn(worker.heartbeat, until or config.train.total_images)
    observers = Observers([MetricsFile(run_dir), StepTimer(run_dir), Progress(), turn])
    with RunLock(run_dir):
        try:
            resolved = resolve_run(config, DEEPSPEED, "experiment", comm.world, comm.info.local_world)
            with open_trainer(resolved, comm, observers, worker) as trainer:
                trainer.run()
                was_asked = trainer.context.signals.received is not None  # the end of a turn is no signal
        finally:
            observers.close()
    return ExitCode.REQUEUE if was_asked else ExitCode.DONE


def held_out_curve(run_dir: Path) -> list[dict[str, Any]]:
    """The held-out losses of a run, with the images seen."""
    keys = ("images_seen", "validation_loss", "validation_mse", "validation_loss_by_timestep", "validation_images")
    return [{key: record[key] for key in keys} for record in read_metrics(run_dir) if "validation_loss" in record]


def checkpoint_of(run_dir: Path, images_seen: int) -> Path:
    return run_dir / "checkpoints" / f"images-{images_seen:012d}"


def is_trained(config: Config, until: int | None = None) -> bool:
    """Whether the run has come to `until` images, or to its end with its last checkpoint."""
    run_dir, total = Path(config.run_dir), config.train.total_images
    curve = held_out_curve(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    until = until or total
    reached = bool(curve) and curve[-1]["images_seen"] >= until
    return reached and (until < total or checkpoint_of(run_dir, total).is_dir())


def seconds_per_image(run_dir: Path, global_batch: int) -> dict[str, float]:
    """What training took for an image: `wall_seconds_per_image`, `cpu_seconds_per_image`, and `measured_steps`.

    Medians over the intervals between logged steps, so that a burst of other load on the machine does not count.
    """
    records, _ = read_records(run_dir / TIMES_FILE)
    cost: dict[str, float] = {"measured_steps": sum(record["steps"] for record in records)}
    for clock in ("wall_seconds", "cpu_seconds"):
        cost[f"{clock}_per_image"] = statistics.median(
            record[clock] / (record["steps"] * global_batch) for record in records
        )
    return cost
