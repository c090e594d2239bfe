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


def _counter(name: str, text: str, *labels: str, by_rank: bool = False) -> MetricSpec:
    return MetricSpec(name, "counter", text, labels, by_rank=by_rank)


def _gauge(name: str, text: str, *labels: str, by_rank: bool = False) -> MetricSpec:
    return MetricSpec(name, "gauge", text, labels, by_rank=by_rank)


def _histogram(name: str, text: str, buckets: tuple[float, ...], by_rank: bool = False) -> MetricSpec:
    return MetricSpec(name, "histogram", text, buckets=buckets, by_rank=by_rank)


RANK_METRICS = (
    _gauge("sdit_build_info",
        "Always 1; the labels are the versions of the code", "version", "git", "torch", "deepspeed"),
    _counter("sdit_steps_total", "Optimizer steps, including steps repeated after a restart"),
    _counter("sdit_images_total", "Images trained on, including images repeated after a restart"),
    _gauge("sdit_images_seen", "The run's clock in images; decreases when a run resumes from a checkpoint"),
    _gauge("sdit_images_goal", "Images at which the run is complete"),
    _gauge("sdit_last_step_timestamp_seconds", "Unix time of the newest step"),
    _histogram("sdit_step_seconds", "Time of a step", STEP_BUCKETS),
    _counter("sdit_phase_seconds_total",
        "Time of a rank by phase (it waits for other ranks in forward_backward)", "phase", by_rank=True),
    _gauge("sdit_loss", "Mean over the newest global batch, by loss term", "part"),
    _gauge("sdit_loss_by_timestep", "Mean squared error by interval of the timestep, newest logged steps", "bin"),
    _gauge("sdit_validation_loss", "Held-out loss, newest measurement"),
    _gauge("sdit_validation_loss_by_timestep", "Held-out mean squared error by interval of the timestep", "bin"),
    _gauge("sdit_grad_norm", "Global gradient norm before clipping"),
    _gauge("sdit_learning_rate", "Learning rate of the newest step"),
    _counter("sdit_skipped_steps_total", "Steps skipped because of a non-finite loss or gradient"),
    _counter("sdit_loss_spikes_total", "Losses far above the mean of previous losses"),
    _counter("sdit_rollbacks_total", "Rollbacks to a checkpoint that skipped samples"),
    _gauge("sdit_model_flops_utilization_ratio", "Model FLOP/s over the peak FLOP/s of the device"),
    _gauge("sdit_expert_load_ratio", "Expected load of an expert over its block's mean; 0: unused", "block", "expert"),
    _gauge("sdit_dead_experts", "Experts of a block that less than 0.005 % of the samples use", "block"),
    _gauge("sdit_expert_load_max_over_mean_ratio", "Largest load of an expert over the mean, worst block"),
    _counter("sdit_expert_dropped_samples_total", "(sample, expert) pairs that experts at capacity dropped", "block"),
    _gauge("sdit_expert_dropped_ratio", "Fraction of (sample, expert) pairs dropped in the newest logged step"),
    _gauge("sdit_token_load_ratio",
        "Choices of a token-routed expert over its block's mean, newest logged step; 0: no token", "block", "expert"),
    _gauge("sdit_token_dead_experts",
        "Token-routed experts of a block that got less than 0.005 % of the choices, newest logged step", "block"),
    _gauge("sdit_token_load_max_over_mean_ratio",
        "Largest choices of a token-routed expert over the mean, worst block"),
    _gauge("sdit_token_dropped_ratio", "Fraction of (token, expert) pairs dropped in the newest step"),
    _gauge("sdit_router_entropy_nats",
        "Mean entropy of a token's scores, newest logged step; ln M if even, 0 if one expert has all", "block"),
    _gauge("sdit_rank_load_max_over_mean_ratio", "Largest expert work of a rank over the mean"),
    _counter("sdit_exchange_bytes_total", "Bytes sent between ranks for experts, all ranks", "mode"),
    _histogram("sdit_exchange_seconds", "Time a step waited for exchanges, mean over ranks", WAIT_BUCKETS),
    _histogram("sdit_data_wait_seconds", "Time a step waited for samples", WAIT_BUCKETS, by_rank=True),
    _counter("sdit_bad_samples_total", "Samples that could not be used, by reason", "reason", by_rank=True),
    _gauge("sdit_rank_work_p50_seconds", "Work of the median rank in a step before it waits for others"),
    _gauge("sdit_rank_work_p99_seconds", "Work of the slowest ranks in a step (99th percentile)"),
    _gauge("sdit_slowest_rank", "Number of the rank with the longest work"),
    _histogram("sdit_checkpoint_seconds", "Time to write and commit a checkpoint", SAVE_BUCKETS),
    _counter("sdit_checkpoint_failures_total", "Checkpoints that could not be written"),
    _gauge("sdit_checkpoint_last_success_timestamp_seconds", "Unix time of the newest commit of this launch"),
    _gauge("sdit_checkpoint_images_seen", "The run's clock at the checkpoint that a restart resumes from"),
    _gauge("sdit_checkpoint_interval_images", "Images between two checkpoints, as configured"),
    _gauge("sdit_memory_bytes", "Memory of a rank's process", "kind", by_rank=True),
)  # fmt: skip

SUPERVISOR_METRICS = (
    _gauge("sdit_rank_up", "1 while the rank's process runs", by_rank=True),
    _gauge("sdit_rank_heartbeat_age_seconds", "Time since the rank last made progress", by_rank=True),
    _gauge("sdit_rank_tick_age_seconds", "Time since the rank's process last ran any Python", by_rank=True),
    _gauge("sdit_rank_deadline_seconds", "Heartbeat age at which the supervisor ends the rank", by_rank=True),
    _gauge("sdit_rank_step", "Current step of the rank", by_rank=True),
    _counter("sdit_rank_ends_total", "Ended processes of the rank, by cause", "cause", by_rank=True),
    _counter("sdit_preemptions_total", "Stop requests that reached the rank's supervisor", by_rank=True),
    _counter("sdit_restarts_total", "Restarts of the run since its launch"),
    _gauge("sdit_run_state", "1 for the current state of the run", "state"),
    _gauge("sdit_disk_free_bytes", "Free space of the run directory's file system"),
)  # fmt: skip

METRICS = {spec.name: spec for spec in (*RANK_METRICS, *SUPERVISOR_METRICS)}
