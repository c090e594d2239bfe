"""The names, units and labels of all metrics: what ranks write to their pages and the node's exporter serves.

`rank` is a label where ranks differ; all else is the same on every rank and written by rank 0. The step is never a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
WAIT_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
SAVE_BUCKETS = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
RUN_STATES = ("starting", "training", "checkpointing", "sampling", "stopping", "restarting", "ended")


@dataclass(frozen=True)
class Family:
    """One metric: every series of it has these labels, and `rank` besides where ranks differ (`by_rank`)."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    by_rank: bool = False

    @property
    def width(self) -> int:
        """Numbers that one series takes on a page: a histogram has its buckets, +Inf and the sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


WRITTEN_BY_RANKS = (
    Family("sdit_build_info", "gauge", "Always 1; the labels say what runs", ("version", "git", "torch", "deepspeed")),
    Family("sdit_steps_total", "counter", "Optimizer steps taken, those taken again after a restart included"),
    Family("sdit_images_total", "counter", "Images trained on, those seen again after a restart included"),
    Family("sdit_images_seen", "gauge", "The run's clock in images; falls when a run goes on from a checkpoint"),
    Family("sdit_images_goal", "gauge", "Images after which the run is done"),
    Family("sdit_last_step_timestamp_seconds", "gauge", "Unix time of the newest step"),
    Family("sdit_step_seconds", "histogram", "Time of a step", buckets=STEP_BUCKETS),
    Family(
        "sdit_phase_seconds_total",
        "counter",
        "Where a rank's time goes (it waits for others in forward_backward)",
        ("phase",),
        by_rank=True,
    ),
    Family("sdit_loss", "gauge", "Mean over the newest global batch, by part of the objective", ("part",)),
    Family(
        "sdit_loss_by_timestep", "gauge", "Mean squared error by part of the time axis, newest logged steps", ("bin",)
    ),
    Family("sdit_validation_loss", "gauge", "Held-out loss, newest measurement"),
    Family(
        "sdit_validation_loss_by_timestep", "gauge", "Held-out mean squared error by part of the time axis", ("bin",)
    ),
    Family("sdit_grad_norm", "gauge", "Global gradient norm before clipping"),
    Family("sdit_learning_rate", "gauge", "Learning rate of the newest step"),
    Family("sdit_skipped_steps_total", "counter", "Steps thrown away for a non-finite loss or gradient"),
    Family("sdit_loss_spikes_total", "counter", "Losses far above the mean of those before"),
    Family("sdit_rollbacks_total", "counter", "Times the run went back to a checkpoint and left samples out"),
    Family("sdit_model_flops_utilization_ratio", "gauge", "Arithmetic of the model over the device's peak"),
    Family(
        "sdit_expert_load_ratio",
        "gauge",
        "Expected load of an expert over its block's mean; 0: dead",
        ("block", "expert"),
    ),
    Family("sdit_dead_experts", "gauge", "Experts of a block that no timestep uses", ("block",)),
    Family("sdit_expert_load_max_over_mean_ratio", "gauge", "Load of the fullest expert over the mean, worst block"),
    Family(
        "sdit_expert_dropped_samples_total", "counter", "(sample, expert) pairs dropped by full experts", ("block",)
    ),
    Family("sdit_expert_dropped_ratio", "gauge", "Share of (sample, expert) pairs dropped in the newest logged step"),
    Family("sdit_rank_load_max_over_mean_ratio", "gauge", "Expert work of the fullest rank over the mean"),
    Family("sdit_exchange_bytes_total", "counter", "Bytes sent between ranks for experts, all ranks", ("mode",)),
    Family(
        "sdit_exchange_seconds", "histogram", "Time a step waited for exchanges, mean over ranks", buckets=WAIT_BUCKETS
    ),
    Family("sdit_data_wait_seconds", "histogram", "Time a step waited for samples", buckets=WAIT_BUCKETS, by_rank=True),
    Family("sdit_bad_samples_total", "counter", "Samples that could not be used, by reason", ("reason",), by_rank=True),
    Family("sdit_rank_work_p50_seconds", "gauge", "Work of the median rank in a step before it waits for others"),
    Family("sdit_rank_work_p99_seconds", "gauge", "The same of the slowest ranks"),
    Family("sdit_slowest_rank", "gauge", "Number of the rank that worked longest"),
    Family("sdit_checkpoint_seconds", "histogram", "Time to write and commit a checkpoint", buckets=SAVE_BUCKETS),
    Family("sdit_checkpoint_failures_total", "counter", "Checkpoints that could not be written"),
    Family("sdit_checkpoint_last_success_timestamp_seconds", "gauge", "Unix time of the newest commit of this launch"),
    Family("sdit_checkpoint_images_seen", "gauge", "The run's clock at the checkpoint that a restart would start from"),
    Family("sdit_checkpoint_interval_images", "gauge", "Images between two checkpoints, as configured"),
    Family("sdit_memory_bytes", "gauge", "Memory of a rank's process", ("kind",), by_rank=True),
)

WRITTEN_BY_SUPERVISORS = (
    Family("sdit_rank_up", "gauge", "1 while the rank's process runs", by_rank=True),
    Family("sdit_rank_heartbeat_age_seconds", "gauge", "Time since the rank last made progress", by_rank=True),
    Family(
        "sdit_rank_tick_age_seconds", "gauge", "Time since the rank's process last ran any Python: frozen, if long",
        by_rank=True,
    ),
    Family("sdit_rank_deadline_seconds", "gauge", "Heartbeat age at which the rank is ended", by_rank=True),
    Family("sdit_rank_step", "gauge", "Step that the rank is in", by_rank=True),
    Family("sdit_rank_ends_total", "counter", "Processes of the rank that ended, by cause", ("cause",), by_rank=True),
    Family("sdit_preemptions_total", "counter", "Stop signals that reached the rank's supervisor", by_rank=True),
    Family("sdit_restarts_total", "counter", "Restarts of the run since its launch"),
    Family("sdit_run_state", "gauge", "1 for the state that the run is in", ("state",)),
    Family("sdit_disk_free_bytes", "gauge", "Free space where the run directory lies"),
)  # fmt: skip

FAMILIES = {family.name: family for family in (*WRITTEN_BY_RANKS, *WRITTEN_BY_SUPERVISORS)}
