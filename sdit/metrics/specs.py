"""The metric specs: name, type, help text, labels and buckets of each Prometheus metric.

If ranks differ in a metric, `rank` is a label of it. Rank 0 writes all other metrics. The step is never a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
WAIT_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
SAVE_BUCKETS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RUN_STATES = ("starting", "training", "checkpointing", "sampling", "stopping", "restarting", "ended")


@dataclass(frozen=True)
class MetricSpec:
    """One metric. Each of its series has these labels, and also `rank` if `by_rank` is set."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    by_rank: bool = False

    @property
    def width(self) -> int:
        """The number of values of one series in a shared metrics file. A histogram has its buckets, +Inf and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


RANK_METRICS = (
    MetricSpec(
        "sdit_build_info",
        "gauge",
        "Always 1; the labels are the versions of the code",
        ("version", "git", "torch", "deepspeed"),
    ),
    MetricSpec("sdit_steps_total", "counter", "Optimizer steps, including steps repeated after a restart"),
    MetricSpec("sdit_images_total", "counter", "Images trained on, including images repeated after a restart"),
    MetricSpec(
        "sdit_images_seen", "gauge", "The run's clock in images; decreases when a run resumes from a checkpoint"
    ),
    MetricSpec("sdit_images_goal", "gauge", "Images at which the run is complete"),
    MetricSpec("sdit_last_step_timestamp_seconds", "gauge", "Unix time of the newest step"),
    MetricSpec("sdit_step_seconds", "histogram", "Time of a step", buckets=STEP_BUCKETS),
    MetricSpec(
        "sdit_phase_seconds_total",
        "counter",
        "Time of a rank by phase (it waits for other ranks in forward_backward)",
        ("phase",),
        by_rank=True,
    ),
    MetricSpec("sdit_loss", "gauge", "Mean over the newest global batch, by loss term", ("part",)),
    MetricSpec(
        "sdit_loss_by_timestep",
        "gauge",
        "Mean squared error by interval of the timestep, newest logged steps",
        ("bin",),
    ),
    MetricSpec("sdit_validation_loss", "gauge", "Held-out loss, newest measurement"),
    MetricSpec(
        "sdit_validation_loss_by_timestep", "gauge", "Held-out mean squared error by interval of the timestep", ("bin",)
    ),
    MetricSpec("sdit_grad_norm", "gauge", "Global gradient norm before clipping"),
    MetricSpec("sdit_learning_rate", "gauge", "Learning rate of the newest step"),
    MetricSpec("sdit_skipped_steps_total", "counter", "Steps skipped because of a non-finite loss or gradient"),
    MetricSpec("sdit_loss_spikes_total", "counter", "Losses far above the mean of previous losses"),
    MetricSpec("sdit_rollbacks_total", "counter", "Rollbacks to a checkpoint that skipped samples"),
    MetricSpec("sdit_model_flops_utilization_ratio", "gauge", "Model FLOP/s over the peak FLOP/s of the device"),
    MetricSpec(
        "sdit_expert_load_ratio",
        "gauge",
        "Expected load of an expert over its block's mean; 0: unused",
        ("block", "expert"),
    ),
    MetricSpec(
        "sdit_dead_experts", "gauge", "Experts of a block that less than 0.005 % of the samples use", ("block",)
    ),
    MetricSpec("sdit_expert_load_max_over_mean_ratio", "gauge", "Largest load of an expert over the mean, worst block"),
    MetricSpec(
        "sdit_expert_dropped_samples_total",
        "counter",
        "(sample, expert) pairs that experts at capacity dropped",
        ("block",),
    ),
    MetricSpec(
        "sdit_expert_dropped_ratio", "gauge", "Fraction of (sample, expert) pairs dropped in the newest logged step"
    ),
    MetricSpec(
        "sdit_token_load_ratio",
        "gauge",
        "Choices of a token-routed expert over its block's mean, newest logged step; 0: no token",
        ("block", "expert"),
    ),
    MetricSpec(
        "sdit_token_dead_experts",
        "gauge",
        "Token-routed experts of a block that got less than 0.005 % of the choices, newest logged step",
        ("block",),
    ),
    MetricSpec(
        "sdit_token_load_max_over_mean_ratio",
        "gauge",
        "Largest choices of a token-routed expert over the mean, worst block",
    ),
    MetricSpec("sdit_token_dropped_ratio", "gauge", "Fraction of (token, expert) pairs dropped in the newest step"),
    MetricSpec(
        "sdit_router_entropy_nats",
        "gauge",
        "Mean entropy of a token's scores, newest logged step; ln M if even, 0 if one expert has all",
        ("block",),
    ),
    MetricSpec("sdit_rank_load_max_over_mean_ratio", "gauge", "Largest expert work of a rank over the mean"),
    MetricSpec("sdit_exchange_bytes_total", "counter", "Bytes sent between ranks for experts, all ranks", ("mode",)),
    MetricSpec(
        "sdit_exchange_seconds", "histogram", "Time a step waited for exchanges, mean over ranks", buckets=WAIT_BUCKETS
    ),
    MetricSpec(
        "sdit_data_wait_seconds", "histogram", "Time a step waited for samples", buckets=WAIT_BUCKETS, by_rank=True
    ),
    MetricSpec(
        "sdit_bad_samples_total", "counter", "Samples that could not be used, by reason", ("reason",), by_rank=True
    ),
    MetricSpec("sdit_rank_work_p50_seconds", "gauge", "Work of the median rank in a step before it waits for others"),
    MetricSpec("sdit_rank_work_p99_seconds", "gauge", "Work of the slowest ranks in a step (99th percentile)"),
    MetricSpec("sdit_slowest_rank", "gauge", "Number of the rank with the longest work"),
    MetricSpec("sdit_checkpoint_seconds", "histogram", "Time to write and commit a checkpoint", buckets=SAVE_BUCKETS),
    MetricSpec("sdit_checkpoint_failures_total", "counter", "Checkpoints that could not be written"),
    MetricSpec(
        "sdit_checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the newest commit of this launch"
    ),
    MetricSpec("sdit_checkpoint_images_seen", "gauge", "The run's clock at the checkpoint that a restart resumes from"),
    MetricSpec("sdit_checkpoint_interval_images", "gauge", "Images between two checkpoints, as configured"),
    MetricSpec("sdit_memory_bytes", "gauge", "Memory of a rank's process", ("kind",), by_rank=True),
)

SUPERVISOR_METRICS = (
    MetricSpec("sdit_rank_up", "gauge", "1 while the rank's process runs", by_rank=True),
    MetricSpec("sdit_rank_heartbeat_age_seconds", "gauge", "Time since the rank last made progress", by_rank=True),
    MetricSpec(
        "sdit_rank_tick_age_seconds", "gauge", "Time since the rank's process last ran any Python",
        by_rank=True,
    ),
    MetricSpec("sdit_rank_deadline_seconds", "gauge", "Heartbeat age at which the supervisor ends the rank", by_rank=True),
    MetricSpec("sdit_rank_step", "gauge", "Current step of the rank", by_rank=True),
    MetricSpec("sdit_rank_ends_total", "counter", "Ended processes of the rank, by cause", ("cause",), by_rank=True),
    MetricSpec("sdit_preemptions_total", "counter", "Stop requests that reached the rank's supervisor", by_rank=True),
    MetricSpec("sdit_restarts_total", "counter", "Restarts of the run since its launch"),
    MetricSpec("sdit_run_state", "gauge", "1 for the current state of the run", ("state",)),
    MetricSpec("sdit_disk_free_bytes", "gauge", "Free space of the run directory's file system"),
)  # fmt: skip

METRICS = {spec.name: spec for spec in (*RANK_METRICS, *SUPERVISOR_METRICS)}
