"""Writes the numbers of each step to the rank's shared metrics file, which sdit.metrics.exporter serves."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from sdit.clock import Clock
from sdit.config import Config
from sdit.data.bad_samples import SampleReason, ShardReason
from sdit.files import read_json
from sdit.launch_environment import RankInfo
from sdit.metrics.shared_file import Series, SharedMetricsWriter
from sdit.metrics.specs import RANK_METRICS
from sdit.observe.routing import evenly
from sdit.train.events import Observer
from sdit.train.record import BINS, BY_BIN, GAUGES, PHASES, StepRecord, Validation

LOSS_TERMS = {"total": "loss", "mse": "mse", "vlb": "vlb", "prior": "prior_loss", "balance": "balance_loss"}
BIN_LABELS = tuple(f"{number:02d}" for number in range(BINS))
REASONS = (*get_args(ShardReason), *get_args(SampleReason))
EVENTS = {  # kind -> counter
    "skipped_step": "sdit_skipped_steps_total",
    "loss_spike": "sdit_loss_spikes_total",
    "rolled_back": "sdit_rollbacks_total",
    "checkpoint_failed": "sdit_checkpoint_failures_total",
}
_log = logging.getLogger(__name__)


class PrometheusObserver(Observer):
    """Writes a rank's numbers to its shared metrics file. It never raises. A full /dev/shm is logged once."""

    every_rank = True

    def __init__(self, config: Config, run_dir: Path, info: RankInfo, path: Path) -> None:
        self._config, self._run_dir, self._path = config, run_dir, path
        self._is_first = info.rank == 0
        self._blocks, self._token_blocks = shown_blocks(config), shown_token_blocks(config)
        self._bad_samples: dict[str, int] = {}
        self._writer: SharedMetricsWriter | None = None

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        labels = build_labels(self._run_dir)
        try:
            self._writer = SharedMetricsWriter(self._path, list(self._series(labels)))
        except (OSError, ValueError) as error:
            _log.warning("this rank writes no metrics: %s", error)
            return
        if self._is_first:
            self._writer.set("sdit_build_info", 1.0, *labels)
            self._writer.set("sdit_images_goal", total_images)
            self._writer.set("sdit_images_seen", clock.images_seen)
            self._writer.set("sdit_checkpoint_images_seen", clock.images_seen)
            self._writer.set("sdit_checkpoint_interval_images", checkpoint_interval_images(self._config))
        self._publish()

    def on_step(self, clock: Clock, record: StepRecord) -> None:
        if self._writer is None:
            return
        self._write_rank(self._writer, record)
        if self._is_first:
            self._write_step(self._writer, clock, record)
            if record.logged:
                self._write_logged(self._writer, record)
        self._publish()

    def on_validation(self, clock: Clock, validation: Validation) -> None:
        if self._writer is None or not self._is_first:
            return
        self._write_values(self._writer, validation)
        self._publish()

    def on_checkpoint(self, clock: Clock, folder: Path, seconds: float) -> None:
        if self._writer is None or not self._is_first:
            return
        self._writer.observe("sdit_checkpoint_seconds", seconds)
        self._writer.set("sdit_checkpoint_last_success_timestamp_seconds", time.time())
        # A checkpoint that is written in the background is older than the clock.
        self._writer.set("sdit_checkpoint_images_seen", int(folder.name.removeprefix("images-")))
        self._publish()

    def on_event(self, clock: Clock, kind: str, text: str) -> None:
        if self._writer is None or not self._is_first or kind not in EVENTS:
            return
        self._writer.add(EVENTS[kind], 1)
        self._publish()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_rank(self, writer: SharedMetricsWriter, record: StepRecord) -> None:
        for phase in PHASES:
            writer.add("sdit_phase_seconds_total", getattr(record, f"{phase}_seconds") or 0.0, phase)
        writer.observe("sdit_data_wait_seconds", record.data_wait_seconds or 0.0)
        for kind, size in (record.memory_bytes or {}).items():
            writer.set("sdit_memory_bytes", size, kind)
        for reason, count in (record.bad_samples_by_reason or {}).items():
            writer.add("sdit_bad_samples_total", count - self._bad_samples.get(reason, 0), reason)
            self._bad_samples[reason] = count

    def _write_step(self, writer: SharedMetricsWriter, clock: Clock, record: StepRecord) -> None:
        writer.add("sdit_steps_total", 1)
        writer.add("sdit_images_total", self._config.train.global_batch)
        writer.set("sdit_images_seen", clock.images_seen)
        writer.set("sdit_last_step_timestamp_seconds", time.time())
        writer.observe("sdit_step_seconds", record.step_seconds or 0.0)
        for term, key in LOSS_TERMS.items():
            value = getattr(record, key)
            writer.set("sdit_loss", math.nan if value is None else value, term)
        self._write_values(writer, record)
        tokens, weights = record.exchange_bytes_tokens or 0.0, record.exchange_bytes_weights or 0.0
        samples = (record.exchange_bytes or 0.0) - tokens - weights
        for mode, sent in {"tokens": tokens, "weights": weights, "seats": samples}.items():
            writer.add("sdit_exchange_bytes_total", sent, mode)
        writer.observe("sdit_exchange_seconds", record.exchange_wait_seconds or 0.0)

    def _write_values(self, writer: SharedMetricsWriter, record: Validation) -> None:
        for name, key in GAUGES.items():
            if (value := getattr(record, key, None)) is not None:
                writer.set(name, value)
        for name, key in BY_BIN.items():
            for number, value in zip(BIN_LABELS, getattr(record, key, None) or (), strict=False):
                writer.set(name, math.nan if value is None else value, number)

    def _write_logged(self, writer: SharedMetricsWriter, record: StepRecord) -> None:
        for block, count in enumerate(record.dropped_by_block_since_logged or ()):
            writer.add("sdit_expert_dropped_samples_total", count, str(block))
        for block, loads in enumerate(record.expert_load or ()):
            mean = sum(loads) / len(loads)
            writer.set("sdit_dead_experts", sum(load == 0 for load in loads), str(block))
            if block in self._blocks:
                for expert, load in enumerate(loads):
                    writer.set("sdit_expert_load_ratio", load / mean, str(block), str(expert))
        self._write_tokens(writer, record)

    def _write_tokens(self, writer: SharedMetricsWriter, record: StepRecord) -> None:
        """Write the loads and the entropy of token-routed experts. A record has one row for each block with such experts."""
        blocks, entropies = self._config.model.moe_blocks, record.router_entropy_by_block or ()
        for block, entropy in zip(blocks, entropies, strict=False):
            writer.set("sdit_router_entropy_nats", entropy, str(block))
        for block, loads in zip(blocks, record.token_load or (), strict=False):
            writer.set("sdit_token_dead_experts", sum(load == 0 for load in loads), str(block))
            if block in self._token_blocks:
                for expert, load in enumerate(loads):
                    writer.set("sdit_token_load_ratio", load * len(loads), str(block), str(expert))

    def _publish(self) -> None:
        assert self._writer is not None
        try:
            self._writer.publish()
        except OSError as error:
            _log.warning("this rank writes no more metrics: %s", error)
            self.close()

    def _series(self, build: Sequence[str]) -> Iterable[Series]:
        """Yield each series of this rank. The config defines all of them, so a counter exists before its first increment."""
        depth = self._config.model.depth if self._config.model.variant == "switch" else 0
        blocks = [(str(block),) for block in range(depth)]
        experts = [str(expert) for expert in range(self._config.model.experts.count)]
        labels: dict[tuple[str, ...], Sequence[tuple[str, ...]]] = {
            (): [()],
            ("version", "git", "torch", "deepspeed"): [tuple(build)],
            ("part",): [(term,) for term in LOSS_TERMS],
            ("bin",): [(number,) for number in BIN_LABELS],
            ("phase",): [(phase,) for phase in PHASES],
            ("mode",): [("tokens",), ("weights",), ("seats",)],
            ("reason",): [(reason,) for reason in REASONS],
            ("kind",): [("resident",), ("device",)],
            ("block",): blocks,
            ("block", "expert"): [(str(block), expert) for block in self._blocks for expert in experts],
        }
        of_tokens = self._token_labels()
        for spec in RANK_METRICS:
            if spec.by_rank or self._is_first:
                yield from ((spec.name, values) for values in of_tokens.get(spec.name, labels[spec.labels]))

    def _token_labels(self) -> dict[str, list[tuple[str, ...]]]:
        """Return the labels of the series of token-routed experts, by metric. A run without such experts has none of them."""
        model, blocks = self._config.model, [(str(block),) for block in self._config.model.moe_blocks]
        experts = [] if model.moe is None else [str(expert) for expert in range(model.moe.experts)]
        whole: list[tuple[str, ...]] = [()] if blocks else []
        return {
            "sdit_token_load_ratio": [(str(block), expert) for block in self._token_blocks for expert in experts],
            "sdit_token_dead_experts": [*blocks],
            "sdit_router_entropy_nats": [*blocks],
            "sdit_token_load_max_over_mean_ratio": whole,
            "sdit_token_dropped_ratio": whole,
        }


def shown_blocks(config: Config) -> list[int]:
    """Return the blocks whose experts have their own series.

    They are evenly spaced, as many as `observe.metrics_experts` allows.
    """
    model = config.model
    if model.variant != "switch":
        return []
    return evenly(range(model.depth), config.observe.metrics_experts // model.experts.count)


def shown_token_blocks(config: Config) -> list[int]:
    """Return the blocks whose token-routed experts have their own series, by the same rule."""
    moe = config.model.moe
    return [] if moe is None else evenly(config.model.moe_blocks, config.observe.metrics_experts // moe.experts)


def checkpoint_interval_images(config: Config) -> float:
    """Return the images between two checkpoints, or NaN if the only checkpoint is at the end."""
    if config.checkpoint.every_images is not None:
        return config.checkpoint.every_images
    if config.checkpoint.every_steps is not None:
        return config.checkpoint.every_steps * config.train.global_batch
    return math.nan


def build_labels(run_dir: Path) -> tuple[str, str, str, str]:
    """Return version, git commit, torch and deepspeed from environment.json."""
    found = read_json(run_dir / "environment.json") or {}
    packages = found.get("packages") or {}
    return (
        str(found.get("sdit", "unknown")),
        str(found.get("git_commit", "unknown"))[:12],
        str(packages.get("torch", "unknown")),
        str(packages.get("deepspeed", "unknown")),
    )
