"""The record of one optimizer step: every metric with its unit and its meaning.

`metrics.jsonl`, the Prometheus gauges, the progress line, W&B, TensorBoard and the metrics reference derive from
`StepRecord`. A new metric is added here and nowhere else. A metric that a step does not measure is None.
L tokens of a sample, M experts of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

BINS = 20  # equal parts of the time axis
PHASES = ("data_wait", "forward_backward", "optimizer", "checkpoint", "sample", "validation")  # of the host's time


def metric(
    unit: str, meaning: str, *, gauge: str | None = None, by_bin: str | None = None, optional: bool = True
) -> Any:
    """A field of a record. `gauge` is the Prometheus gauge that shows it, `by_bin` a gauge with one series per bin."""
    metadata = {"unit": unit, "meaning": meaning, "gauge": gauge, "by_bin": by_bin}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often the experts of each block were chosen in one step, before drops, over all ranks. Whole numbers in float64.

    `by_time` (blocks, BINS, M) are the choices by equal parts of the time axis, `by_position` (blocks, L, M) those by position
    of the token in the image. `dropped` (blocks,) are the choices that a full expert did not compute.
    """

    by_time: np.ndarray
    by_position: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True)
class Validation:
    """The held-out loss, measured with the averaged weights at fixed timesteps and noise."""

    validation_loss: float | None = metric(
        "loss", "held-out noise loss, with the bound's term if the variance is learned", gauge="sdit_validation_loss"
    )
    validation_mse: float | None = metric("loss", "held-out mean squared error of the prediction")
    validation_loss_by_timestep: list[float | None] | None = metric(
        f"loss, {BINS} bins", "held-out error by equal parts of the time axis",
        by_bin="sdit_validation_loss_by_timestep",
    )  # fmt: skip
    validation_images: int | None = metric("images", "held-out images that were measured")

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics that were measured, by name, as JSON types."""
        return {key: value for name in fields(self) if (value := getattr(self, key := name.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class StepRecord(Validation):
    """What one optimizer step reports. Losses and the gradient norm are those of the global batch, over all ranks.

    `logged` marks the steps that `metrics.jsonl` keeps: every `train.log_every_steps`, validated ones, and the last.
    """

    step: int = metric("steps", "optimizer steps taken since the start of the run", optional=False)
    images_seen: int = metric("images", "training images seen since the start of the run", optional=False)
    loss: float | None = metric("loss", "total loss, the sum of the weighted terms")
    mse: float | None = metric("loss", "mean squared error of the prediction")
    vlb: float | None = metric("loss", "variational bound's term (learned variance)")
    prior_loss: float | None = metric("loss", "diffusion prior loss, before its weight")
    balance_loss: float | None = metric("loss", "load-balance loss, before its weight")
    aux_loss: float | None = metric(
        "loss", "balance loss of token-routed experts, with its weight; only if there are such experts"
    )
    direction_loss: float | None = metric(
        "loss", "flow: 1 - cosine between velocity and target, before its weight; only if it is on"
    )
    contrastive_loss: float | None = metric(
        "loss", "flow: squared distance of the velocity to another sample's target, before its weight; only if it is on"
    )
    grad_norm: float | None = metric("norm", "global gradient norm before clipping", gauge="sdit_grad_norm")
    learning_rate: float | None = metric("rate", "learning rate of the step", gauge="sdit_learning_rate")
    exchange_bytes: float | None = metric("bytes", "sent by all ranks for experts in the step")
    exchange_bytes_tokens: float | None = metric("bytes", "of these: tokens of samples")
    exchange_bytes_weights: float | None = metric("bytes", "of these: expert weights and their gradients")
    exchange_wait_seconds: float | None = metric("seconds", "mean over ranks of the wait for transfers")
    skipped_steps: int | None = metric("steps", "non-finite steps that this process skipped")
    bad_samples: int | None = metric("samples", "unreadable samples in this epoch, over all ranks")
    bad_samples_by_reason: Mapping[str, int] | None = metric("samples", "unreadable samples of this rank, by reason")
    images_per_second: float | None = metric("images/s", "global batch over the seconds of the step")
    step_seconds: float | None = metric("seconds", "load, forward, backward and update, without periodic tasks")
    model_flops_utilization: float | None = metric(
        "fraction", "model FLOPs over observe.peak_teraflops", gauge="sdit_model_flops_utilization_ratio"
    )
    data_wait_seconds: float | None = metric("seconds", "rank 0 waited for the loader")
    forward_backward_seconds: float | None = metric("seconds", "forward and backward passes on rank 0")
    optimizer_seconds: float | None = metric("seconds", "optimizer step and EMA on rank 0")
    checkpoint_seconds: float | None = metric("seconds", "checkpoint work since the last step")
    sample_seconds: float | None = metric("seconds", "sampling since the last step")
    validation_seconds: float | None = metric("seconds", "validation since the last step")
    pause_seconds: float | None = metric("seconds", "checkpoint, sampling and validation since the last step")
    memory_bytes: Mapping[str, int] | None = metric(
        "bytes", "memory of rank 0: resident on the host, on the device; on a GPU also the peak and what is reserved"
    )
    dropped_fraction: float | None = metric(
        "fraction", "(sample, expert) pairs over capacity, of the step", gauge="sdit_expert_dropped_ratio"
    )
    expert_load_max_over_mean: float | None = metric(
        "ratio", "largest expected load of an expert over the mean", gauge="sdit_expert_load_max_over_mean_ratio"
    )
    token_load_max_over_mean: float | None = metric(
        "ratio", "token-routed experts: largest choices of an expert in the step over the mean of its block",
        gauge="sdit_token_load_max_over_mean_ratio",
    )  # fmt: skip
    token_dropped_fraction: float | None = metric(
        "fraction", "token-routed experts: (token, expert) pairs over capacity, of the step",
        gauge="sdit_token_dropped_ratio",
    )  # fmt: skip
    router_entropy: float | None = metric(
        "nats", "token-routed experts: mean entropy of the scores of a token; log M if they are even"
    )
    token_load: list[list[float]] | None = metric(
        "fraction, [block][expert]", "token-routed experts: share of the choices of the step, blocks with such experts"
    )
    router_entropy_by_block: list[float] | None = metric(
        "nats, by block", "token-routed experts: the same for each block with such experts"
    )
    rank_work_max_over_mean: float | None = metric(
        "ratio", "largest expert work of a rank over the mean", gauge="sdit_rank_load_max_over_mean_ratio"
    )
    planned_ahead_fraction: float | None = metric(
        "fraction", "plans of the exchange that were ready before their step, since the last logged step"
    )
    expert_load: list[list[float]] | None = metric(
        "fraction, [block][expert]", "expected share of samples that use an expert"
    )
    dropped_by_block: list[int] | None = metric("pairs, by block", "pairs over capacity, of the step")
    dropped_by_block_since_logged: list[int] | None = metric("pairs, by block", "the same since the last logged step")
    rank_step_seconds_p50: float | None = metric(
        "seconds",
        "median over ranks of loading and forward passes, with their waits for experts: mean of a step since the last logged "
        "one, without this step. Ranks within 4.4 % of each other count with their mean",
        gauge="sdit_rank_work_p50_seconds",
    )
    rank_step_seconds_p99: float | None = metric(
        "seconds", "99th percentile over ranks of the same, as exact", gauge="sdit_rank_work_p99_seconds"
    )
    slowest_rank: int | None = metric("rank", "rank with the most of the same", gauge="sdit_slowest_rank")
    loss_by_timestep: list[float | None] | None = metric(
        f"loss, {BINS} bins", "mse since the last logged step by equal parts of the time axis",
        by_bin="sdit_loss_by_timestep",
    )  # fmt: skip
    spent_since_logged: Mapping[str, float] | None = metric("seconds", "sums of the times since the last logged step")
    # The counts of a map, if one is due.
    token_counts: TokenCounts | None = field(default=None, compare=False, metadata={"internal": True})
    logged: bool = field(default=False, metadata={"internal": True})
    stop_requested: bool = field(default=False, metadata={"internal": True})

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics that the step has, by name, as JSON types: a line of `metrics.jsonl`."""
        return {key: value for key in METRICS if (value := getattr(self, key)) is not None}


_HELD_OUT = [each.name for each in fields(Validation)]
_OWN = [each.name for each in fields(StepRecord) if each.name not in _HELD_OUT and not each.metadata.get("internal")]
METRICS = (*_OWN, *_HELD_OUT)  # the held-out loss comes last in a line
GAUGES = {name: each.name for each in fields(StepRecord) if (name := each.metadata.get("gauge"))}
BY_BIN = {name: each.name for each in fields(StepRecord) if (name := each.metadata.get("by_bin"))}
