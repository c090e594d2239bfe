"""The predicted seconds of an optimizer step by part, from the planned run and the figures of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from sdit.model.flops import expert_flops_per_image, flops_per_image
from sdit.planner.hardware import Collective, Hardware
from sdit.planner.layout import Group, Job
from sdit.planner.memory import average_count
from sdit.planner.time_formulas import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    compute_seconds,
    crossing_fraction,
    exposed_seconds,
    memory_seconds,
    mfu_at_width,
    ranks_inside,
)
from sdit.planner.traffic import Exchange

GIGA, TERA, MICRO, MILLI = 1e9, 1e12, 1e-6, 1e-3
BACKWARD = 2 / 3  # of the arithmetic of a pass
RECOMPUTED = 4 / 3  # of the arithmetic of a step, if each block is computed once more in backward
FLOAT_BYTES = 4
# Numbers of 4 bytes that are read or written per trained parameter. Fused, AdamW reads the weight, the gradient and two
# moments, and writes three of them. Without fusion torch runs 8 element-wise operations on two or three tensors each.
UPDATE_NUMBERS = {"adamw": {True: 7, False: 18}, "muon": {True: 7, False: 18}, "sgd": {True: 3, False: 3}}
AVERAGE_NUMBERS = 3  # an average: read, read the weight, write
REDUCED_NUMBERS = 8  # a gradient: into the bucket, its mean, out of the bucket, and its norm; two each


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step of the slowest rank by part. Transfers count as far as computation does not hide them.

    `imbalance` is the wait for the rank with the most expert work.
    """

    compute: float
    imbalance: float
    exchange_inside: float
    exchange_between: float
    gradients: float
    optimizer: float
    host: float

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by name."""
        return asdict(self)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def dominant(self) -> str:
        """The name of the longest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def predict_step(job: Job, exchange: Exchange | None, hardware: Hardware) -> StepTime:
    """Return the time of a step. `exchange` is that of `plan_exchange`."""
    device = hardware.device
    images = job.batch.global_batch / job.world
    recomputed = 1.0 if job.config.parallel.activation_checkpointing == "none" else RECOMPUTED

    def seconds_of(flops: float) -> float:
        peak = device.bf16_teraflops if job.element_bytes == 2 else device.fp32_teraflops
        return compute_seconds(recomputed * flops, TERA * peak, mfu_at_width(device.mfu, job.config.model.width))

    compute = seconds_of(images * flops_per_image(job.config.model).train + _served_flops(job, exchange))
    excess = 0.0 if exchange is None else exchange.load_imbalance - 1
    hiding = compute if device.kind == "cuda" else 0.0
    inside, between = _exchange_seconds(job, exchange, hardware, hiding if job.config.parallel.overlap else 0.0)
    return StepTime(
        compute=compute,
        imbalance=excess * seconds_of(images * expert_flops_per_image(job.config.model).train),
        exchange_inside=inside,
        exchange_between=between,
        gradients=_gradient_seconds(job, hardware, BACKWARD * hiding if job.bucket_count > 1 else 0.0),
        optimizer=_optimizer_seconds(job, hardware),
        host=MILLI * hardware.host.step_milliseconds + MICRO * hardware.host.step_microseconds_per_rank * job.world,
    )


def _served_flops(job: Job, exchange: Exchange | None) -> float:
    """Return the FLOPs of a step in which a rank computes linear experts for samples of other ranks.

    A sample whose experts are on one rank takes one product with their merged matrix, and one more on each further rank.
    """
    model = job.config.model
    if exchange is None or model.experts.kind != "linear":
        return 0.0
    return exchange.served_rows * 3 * 2 * model.tokens * model.width**2


def _exchange_seconds(
    job: Job, exchange: Exchange | None, hardware: Hardware, hiding_seconds: float
) -> tuple[float, float]:
    """Return the seconds of the experts' exchange inside a node and between nodes.

    Weights of replicated experts are sent one block ahead, so that `hiding_seconds` of computation hide them. Rows are sent
    when the next operation needs them. An all-to-all of ranks on several nodes has the fixed time of the link between nodes.
    """
    if exchange is None:
        return 0.0, 0.0
    crossing = crossing_fraction(job.expert_parallel, job.per_node)
    found = []
    for link, fraction in ((hardware.inside, 1 - crossing), (hardware.between, crossing)):
        operation = link.all_to_all
        messages = 1 if (fraction > 0 and (crossing == 0 or link is hardware.between)) else 0
        rows = all_to_all_seconds(fraction * exchange.row_bytes, messages * exchange.row_messages, *_rates(operation))
        replicas = all_to_all_seconds(
            fraction * exchange.replica_bytes, messages * exchange.replica_messages, *_rates(operation)
        )
        found.append(rows + exposed_seconds(replicas, hiding_seconds))
    return found[0], found[1]


def _gradient_seconds(job: Job, hardware: Hardware, hiding_seconds: float) -> float:
    """Return the seconds to reduce the gradients and, under ZeRO, to gather the weights.

    DeepSpeed reduces whole buckets with all-reduces (`reduce_scatter` is false), under ZeRO 2 in each micro-step. With
    `overlap_comm`, `hiding_seconds` of backward passes hide the reduction.
    """
    accumulation = job.batch.accumulation
    times, shown = (accumulation, 1) if job.stage == 2 else (1, accumulation)
    reduction = sum(times * _reduce_seconds(job, group, hardware) for group in job.groups)
    gathering = sum(_gather_seconds(job, group, hardware) for group in job.groups) if job.stage else 0.0
    return exposed_seconds(reduction, hiding_seconds / shown) + gathering


def _reduce_seconds(job: Job, group: Group, hardware: Hardware) -> float:
    """Return the seconds of all-reduces of a group's gradients: within nodes, and of each rank's part between nodes.

    The two levels are those of hierarchical all-reduce (Jia et al., arXiv 1807.11205).
    """
    buckets = -(-group.numel // job.bucket_numel)
    return buckets * _two_levels(job, group, hardware, all_reduce_seconds, "all_reduce", group.numel / buckets)


def _gather_seconds(job: Job, group: Group, hardware: Hardware) -> float:
    """Return the seconds to gather a group's updated weights."""
    return _two_levels(job, group, hardware, all_gather_seconds, "all_gather", group.numel)


def _two_levels(
    job: Job, group: Group, hardware: Hardware, formula: Callable[..., float], name: str, numel: float
) -> float:
    """Return the seconds of a collective on `numel` weights within nodes, and on each rank's part between nodes."""
    inside = ranks_inside(group.ranks, job.expert_parallel if group.experts else 1, job.per_node)
    size_bytes = numel * job.element_bytes
    near, far = (_rates(getattr(link, name)) for link in (hardware.inside, hardware.between))
    seconds = formula(size_bytes, inside, *near) + formula(size_bytes / inside, group.ranks // inside, *far)
    return float(seconds)


def _optimizer_seconds(job: Job, hardware: Hardware) -> float:
    """Return the seconds of the update, the averages, and the copies of gradients, which the memory limits."""
    kind, is_fused = job.config.optimizer.kind, hardware.device.kind == "cuda" and not job.offload
    numbers = 0.0
    for group in job.groups:
        partition = group.partition_numel if job.stage else group.numel
        averaged = AVERAGE_NUMBERS * average_count(job) * group.numel / group.ranks
        numbers += UPDATE_NUMBERS[kind][is_fused] * partition + averaged + REDUCED_NUMBERS * group.numel
    device = hardware.device
    speed = device.host_copy_gigabytes_per_second if job.offload else device.memory_gigabytes_per_second
    return memory_seconds(FLOAT_BYTES * numbers, GIGA * speed)


def _rates(collective: Collective) -> tuple[float, float]:
    """Return bytes per second and the fixed seconds."""
    return GIGA * collective.gigabytes_per_second, MICRO * collective.fixed_microseconds
