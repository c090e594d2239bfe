"""A run on a cluster, predicted: step, checkpoints, failures, days and cost."""

from __future__ import annotations

from dataclasses import dataclass

from sdit.model.flops import flops_per_image
from sdit.planner.hardware import Hardware
from sdit.planner.layout import Job
from sdit.planner.memory import checkpoint_bytes
from sdit.planner.step_time import GIGA, TERA, StepTime, predict_step
from sdit.planner.time_formulas import (
    cost_of,
    daly_interval_seconds,
    days_of,
    goodput,
    job_mtbf_seconds,
    memory_seconds,
    write_seconds,
    young_interval_seconds,
)
from sdit.planner.traffic import Exchange


@dataclass(frozen=True)
class CheckpointTimes:
    """Seconds of a checkpoint: `stall` of the training, `write` until it is complete, `restart` after a failure."""

    stall: float
    write: float
    restart: float


@dataclass(frozen=True)
class Reliability:
    """The best interval between checkpoints, and the fraction of the time that is kept training.

    `interval_seconds` is Daly's, `young_seconds` Young's. `goodput` is that of the best interval, `configured_goodput` that
    of the config's (None: the config has none). `goodput` is 0 if the job does not get from one checkpoint to the next.
    """

    mtbf_seconds: float
    interval_seconds: float
    young_seconds: float
    goodput: float
    configured_goodput: float | None


@dataclass(frozen=True)
class Simulation:
    """What a run costs on a cluster. `days` and `cost` are for `images`. They are None if training never gets there.

    `cost` is also None without a price. `mfu` is the model-FLOPs utilization of whole steps.
    """

    hardware: Hardware
    step: StepTime
    images_per_second: float
    mfu: float
    checkpoint: CheckpointTimes
    reliability: Reliability
    images: int
    days: float | None
    cost: float | None


def simulate(job: Job, exchange: Exchange | None, hardware: Hardware, images: int | None = None) -> Simulation:
    """Return the prediction. `images` None: the length of the config's run."""
    step = predict_step(job, exchange, hardware)
    images = job.config.train.total_images if images is None else images
    speed = job.batch.global_batch / step.total
    peak = hardware.device.bf16_teraflops if job.element_bytes == 2 else hardware.device.fp32_teraflops
    checkpoint = checkpoint_times(job, hardware)
    reliability = _reliability(job, hardware, checkpoint, step.total)
    days = days_of(images, speed, reliability.goodput) if reliability.goodput else None
    price = hardware.price_per_device_hour
    return Simulation(
        hardware=hardware,
        step=step,
        images_per_second=speed,
        mfu=speed * flops_per_image(job.config.model).train / (TERA * peak * job.world),
        checkpoint=checkpoint,
        reliability=reliability,
        images=images,
        days=days,
        cost=None if price is None or days is None else cost_of(days, job.world, price),
    )


def checkpoint_times(job: Job, hardware: Hardware) -> CheckpointTimes:
    """Return the times of a checkpoint. With `checkpoint.asynchronous`, training waits for the copy to host memory only.

    A failure then also loses the work done while the newest checkpoint was written, which counts as a longer restart.
    """
    size, nodes, storage = checkpoint_bytes(job), job.world // job.per_node, hardware.storage
    copy = memory_seconds(size / job.world, GIGA * hardware.device.host_copy_gigabytes_per_second)
    transfer = write_seconds(
        size, nodes, GIGA * storage.node_gigabytes_per_second, GIGA * storage.total_gigabytes_per_second
    )
    restart = hardware.host.restart_seconds + transfer
    if job.config.checkpoint.asynchronous:
        return CheckpointTimes(copy, copy + transfer, restart + transfer)
    return CheckpointTimes(copy + transfer, copy + transfer, restart)


def _reliability(job: Job, hardware: Hardware, checkpoint: CheckpointTimes, step_seconds: float) -> Reliability:
    """Return the best interval. Writes in the background do not overlap with one another."""
    mtbf = job_mtbf_seconds(hardware.node_mtbf_hours, job.world // job.per_node)
    interval = max(daly_interval_seconds(checkpoint.stall, mtbf), checkpoint.write - checkpoint.stall, step_seconds)
    config, configured = job.config.checkpoint, None
    if config.every_steps or config.every_images:
        steps = config.every_steps or -(-(config.every_images or 1) // job.batch.global_batch)
        configured = goodput(steps * step_seconds, checkpoint.stall, checkpoint.restart, mtbf)
    best = goodput(interval, checkpoint.stall, checkpoint.restart, mtbf)
    return Reliability(mtbf, interval, young_interval_seconds(checkpoint.stall, mtbf), best, configured)
