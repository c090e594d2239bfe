"""Laws of the shared metrics file: whole at any instant, counters that never fall, bounded series, no harm to training."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sdit.clock import Clock
from sdit.config import Config, load_config
from sdit.launch_environment import RankInfo
from sdit.metrics.collector import SharedMetricsCollector
from sdit.metrics.shared_file import (
    RankStatus,
    SharedMetricsFile,
    SharedMetricsWriter,
    remove_abandoned_files,
    shared_path,
)
from sdit.metrics.specs import RANK_METRICS
from sdit.observe.metrics import BIN_LABELS, PrometheusObserver, shown_blocks, shown_token_blocks
from sdit.train.record import StepRecord

ROOT = Path(__file__).resolve().parents[3]
SERIES = [("sdit_steps_total", ()), ("sdit_images_total", ()), ("sdit_step_seconds", ())]
RECORD = {
    "loss": 1.5, "mse": 1.25, "vlb": 0.25, "prior_loss": 0.5, "balance_loss": 0.0, "grad_norm": 2.0, "learning_rate": 1e-3,
    "step_seconds": 0.2, "exchange_bytes": 100.0, "exchange_bytes_tokens": 60.0, "exchange_bytes_weights": 30.0,
    "exchange_wait_seconds": 0.01, "data_wait_seconds": 0.002, "forward_backward_seconds": 0.15,
    "memory_bytes": {"resident": 1 << 20, "device": 0}, "bad_samples_by_reason": {"undecodable": 2},
}  # fmt: skip
LOGGED = {
    **RECORD, "expert_load": [[0.5, 0.25, 0.25, 0.0]] * 2, "expert_load_max_over_mean": 2.0,
    "dropped_by_block_since_logged": [3, 1],
    "dropped_fraction": 0.1, "loss_by_timestep": [0.5] * 19 + [None], "model_flops_utilization": 0.4,
    "rank_step_seconds_p50": 0.1, "rank_step_seconds_p99": 0.12, "slowest_rank": 1,
}  # fmt: skip


def record(values: dict[str, Any], logged: bool = False) -> StepRecord:
    return StepRecord(step=1, images_seen=32, logged=logged, **values)


@pytest.fixture
def shared_file() -> Iterator[SharedMetricsFile]:
    nonce = f"test-{os.getpid()}-{time.monotonic_ns()}"
    shared_file = SharedMetricsFile.create(nonce)
    yield shared_file
    shared_file.close()
    shared_file.path.unlink(missing_ok=True)


def tiny(*overrides: str) -> Config:
    return load_config(str(ROOT / "tests" / "distributed" / "tiny.yaml"), list(overrides))


def status(rank: int = 0) -> RankStatus:
    now = time.monotonic()
    return RankStatus(rank, True, 7, "training", 180.0, now - 3, now, now, restarts=1, ends={"exit": 1})


def samples(shared_file: SharedMetricsFile) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a scrape would say: (name, labels) -> value."""
    registry = CollectorRegistry()
    registry.register(SharedMetricsCollector(lambda: [shared_file.path], lambda: None))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(found: dict, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_write_that_was_cut_leaves_the_one_before_it(shared_file: SharedMetricsFile) -> None:
    for number in range(1, 6):
        shared_file.values.write(b"x" * 100 * number)
        torn = SharedMetricsFile.open(shared_file.path)
        offset = torn.values._slot(number + 1)
        os.pwrite(torn._descriptor, b"\xff" * 50, offset + 3)  # a writer that was killed while it wrote the next one
        assert torn.values.read() == b"x" * 100 * number
        torn.close()


def test_reader_sees_whole_files_while_the_writer_runs_is_stopped_and_is_replaced(
    shared_file: SharedMetricsFile,
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sdit.metrics.shared_file import SharedMetricsWriter\n"
        "writer = SharedMetricsWriter(Path(sys.argv[1]), "
        "[('sdit_steps_total', ()), ('sdit_images_total', ()), ('sdit_step_seconds', ())])\n"
        "while True:\n"
        "    writer.add('sdit_steps_total', 1); writer.add('sdit_images_total', 1)\n"
        "    writer.observe('sdit_step_seconds', 0.25); writer.publish()\n"
        "    time.sleep(0.0005)\n"
    )
    newest = 0.0
    for _ in range(2):  # the second process continues where the first was killed
        writer = subprocess.Popen([sys.executable, "-c", code, str(shared_file.path)], cwd=ROOT)
        try:
            deadline, seen = time.monotonic() + 60, 0
            while seen < 300 and time.monotonic() < deadline:
                before = newest
                newest = check_whole(shared_file, newest)
                seen += newest > before
            os.kill(writer.pid, signal.SIGSTOP)
            assert check_whole(shared_file, newest) >= newest
        finally:
            writer.kill()
            writer.wait()
        assert seen == 300, "the writer made no progress"
        newest = check_whole(shared_file, newest)


def check_whole(shared_file: SharedMetricsFile, newest: float) -> float:
    numbers = dict(shared_file.numbers())
    if not numbers:
        return newest
    steps = numbers["sdit_steps_total", ()][0]
    histogram = numbers["sdit_step_seconds", ()]
    assert steps == numbers["sdit_images_total", ()][0] == sum(histogram[:-1]) == histogram[-1] * 4
    assert steps >= newest
    return steps


def test_records_become_metrics_with_units_and_labels(shared_file: SharedMetricsFile, tmp_path: Path) -> None:
    shared_file.write_status(status())
    observer = PrometheusObserver(tiny(), tmp_path, RankInfo(0, 2, 0, 2, "test"), shared_file.path)
    observer.on_start(Clock(64, 2), 640, "")
    assert "sdit_grad_norm" not in {name for name, _ in samples(shared_file)}, "what is not known yet is not served"
    observer.on_step(Clock(96, 3), record(RECORD))
    observer.on_step(Clock(128, 4), record(LOGGED, logged=True))
    observer.on_checkpoint(Clock(128, 4), tmp_path / "images-000000000096", 0.7)
    for kind in ("checkpoint_failed", "loss_spike", "skipped_step", "experts"):
        observer.on_event(Clock(128, 4), kind, "")
    found = samples(shared_file)
    assert value(found, "sdit_steps_total") == 2 and value(found, "sdit_images_total") == 64
    assert value(found, "sdit_images_seen") == 128 and value(found, "sdit_images_goal") == 640
    assert value(found, "sdit_loss", part="total") == 1.5 and value(found, "sdit_loss", part="vlb") == 0.25
    assert value(found, "sdit_loss_by_timestep", bin=BIN_LABELS[0]) == 0.5
    assert ("sdit_loss_by_timestep", (("bin", BIN_LABELS[19]),)) not in found
    assert value(found, "sdit_expert_load_ratio", block="1", expert="0") == 2.0
    assert value(found, "sdit_dead_experts", block="0") == 1.0
    assert value(found, "sdit_expert_dropped_samples_total", block="0") == 3.0
    assert value(found, "sdit_exchange_bytes_total", mode="tokens") == 120.0
    assert value(found, "sdit_exchange_bytes_total", mode="seats") == 20.0
    assert value(found, "sdit_bad_samples_total", reason="undecodable", rank="0") == 2.0
    assert value(found, "sdit_memory_bytes", kind="resident", rank="0") == 1 << 20
    assert value(found, "sdit_model_flops_utilization_ratio") == 0.4
    for name in ("sdit_checkpoint_failures_total", "sdit_loss_spikes_total", "sdit_skipped_steps_total"):
        assert value(found, name) == 1.0
    assert value(found, "sdit_checkpoint_images_seen") == 96
    shown = {
        "sdit_grad_norm": 2.0,
        "sdit_learning_rate": 1e-3,
        "sdit_expert_dropped_ratio": 0.1,
        "sdit_slowest_rank": 1,
    }
    shown |= {"sdit_expert_load_max_over_mean_ratio": 2.0}
    shown |= {"sdit_rank_work_p50_seconds": 0.1, "sdit_rank_work_p99_seconds": 0.12}
    assert {name: value(found, name) for name in shown} == shown
    assert abs(value(found, "sdit_rank_heartbeat_age_seconds", rank="0") - 3) < 60
    assert value(found, "sdit_run_state", state="training") == 1.0 and value(found, "sdit_restarts_total") == 1.0


def test_token_routed_experts_have_metrics_by_block(shared_file: SharedMetricsFile, tmp_path: Path) -> None:
    shared_file.write_status(status())
    config = tiny("model.variant=dit", "model.depth=4", "model.moe={experts: 4, every: 2}")
    observer = PrometheusObserver(config, tmp_path, RankInfo(0, 1, 0, 1, "test"), shared_file.path)
    observer.on_start(Clock(), 640, "")
    assert not [name for name, _ in samples(shared_file) if "token_" in name or "router" in name]
    logged = {
        **RECORD, "token_load": [[0.5, 0.25, 0.25, 0.0], [0.25] * 4], "token_load_max_over_mean": 2.0,
        "token_dropped_fraction": 0.125, "router_entropy": 0.75, "router_entropy_by_block": [0.5, 1.0],
    }  # fmt: skip
    observer.on_step(Clock(32, 1), record(logged, logged=True))
    found = samples(shared_file)
    assert [value(found, "sdit_token_load_ratio", block="1", expert=str(each)) for each in range(4)] == [2, 1, 1, 0]
    assert value(found, "sdit_token_load_ratio", block="3", expert="3") == 1
    assert [value(found, "sdit_token_dead_experts", block=block) for block in "13"] == [1, 0]
    assert [value(found, "sdit_router_entropy_nats", block=block) for block in "13"] == [0.5, 1.0]
    assert value(found, "sdit_token_load_max_over_mean_ratio") == 2.0
    assert value(found, "sdit_token_dropped_ratio") == 0.125


def test_a_run_without_token_routed_experts_has_no_series_of_them(tmp_path: Path) -> None:
    observer = PrometheusObserver(tiny(), tmp_path, RankInfo(0, 1, 0, 1, "test"), tmp_path / "unused")
    of_tokens = {spec.name for spec in RANK_METRICS if spec.name.startswith(("sdit_token_", "sdit_router_"))}
    assert len(of_tokens) == 5 and not of_tokens & {name for name, _ in observer._series(("",) * 4)}


@pytest.mark.parametrize(("cap", "blocks"), [(512, [1, 3, 5]), (12, [1, 3, 5]), (8, [1, 5]), (7, [1]), (3, [])])
def test_token_routed_experts_have_at_most_so_many_series(cap: int, blocks: list[int]) -> None:
    keys = ("model.depth=7", "model.moe={experts: 4, every: 2}", f"observe.metrics_experts={cap}")
    assert shown_token_blocks(tiny(*keys)) == blocks


def test_histogram_is_cumulative_and_ends_with_its_count(shared_file: SharedMetricsFile) -> None:
    shared_file.write_status(status())
    writer = SharedMetricsWriter(shared_file.path, SERIES)
    for seconds in (0.005, 0.01, 0.3, 1000.0):
        writer.observe("sdit_step_seconds", seconds)
    writer.publish()
    found = samples(shared_file)
    buckets = {
        dict(labels)["le"]: count for (name, labels), count in found.items() if name == "sdit_step_seconds_bucket"
    }
    assert buckets["0.01"] == 2 and buckets["0.25"] == 2 and buckets["0.5"] == 3 and buckets["+Inf"] == 4
    assert value(found, "sdit_step_seconds_count") == 4 and value(found, "sdit_step_seconds_sum") == 1000.315
    writer.close()


def test_other_ranks_write_what_differs_between_ranks_alone(shared_file: SharedMetricsFile, tmp_path: Path) -> None:
    shared_file.write_status(status(rank=1))
    observer = PrometheusObserver(tiny(), tmp_path, RankInfo(1, 2, 1, 2, "test"), shared_file.path)
    observer.on_start(Clock(), 640, "")
    observer.on_step(Clock(32, 1), record(LOGGED, logged=True))
    assert all(("rank", "1") in labels for _, labels in samples(shared_file))


@pytest.mark.parametrize(
    ("depth", "experts", "cap"), [(2, 4, 512), (28, 64, 512), (28, 64, 64), (28, 64, 63), (28, 8, 0), (1, 8, 8)]
)
def test_experts_have_at_most_so_many_series_over_the_whole_depth(depth: int, experts: int, cap: int) -> None:
    config = tiny(f"model.depth={depth}", f"model.experts.count={experts}", f"observe.metrics_experts={cap}")
    blocks = shown_blocks(config)
    assert len(blocks) == len(set(blocks)) == min(depth, cap // experts)
    if len(blocks) > 1:
        assert (blocks[0], blocks[-1]) == (0, depth - 1)


def test_no_series_has_the_step_or_anything_else_without_bound_as_a_label(
    shared_file: SharedMetricsFile, tmp_path: Path
) -> None:
    shared_file.write_status(status())
    observer = PrometheusObserver(tiny(), tmp_path, RankInfo(0, 1, 0, 1, "test"), shared_file.path)
    observer.on_start(Clock(), 640, "")
    before = set()
    for step in range(1, 4):
        observer.on_step(Clock(32 * step, step), record(LOGGED, logged=True))
        before = before or set(samples(shared_file))
        assert set(samples(shared_file)) == before


def test_full_shared_memory_is_told_once_and_stops_nothing(
    shared_file: SharedMetricsFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = PrometheusObserver(tiny(), tmp_path, RankInfo(0, 1, 0, 1, "test"), shared_file.path)
    observer.on_start(Clock(), 640, "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write beyond it fails as on a full file system
    try:
        for step in range(1, 4):
            observer.on_step(Clock(32 * step, step), record(LOGGED, logged=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.message.split(":")[0] for record in caplog.records] == ["this rank writes no more metrics"]


def test_files_of_dead_supervisors_are_removed_and_those_of_living_ones_stay(shared_file: SharedMetricsFile) -> None:
    nonce = f"dead-{os.getpid()}-{time.monotonic_ns()}"
    SharedMetricsFile.create(nonce).close()
    for path in (shared_path(nonce), shared_file.path):
        os.utime(path, (0, 0))
    remove_abandoned_files()
    assert shared_file.path.exists() and not shared_path(nonce).exists()


def test_unknown_stays_unknown_over_a_restart_and_counters_go_on(shared_file: SharedMetricsFile) -> None:
    series = [("sdit_steps_total", ()), ("sdit_grad_norm", ())]
    first = SharedMetricsWriter(shared_file.path, series)
    first.add("sdit_steps_total", 5)
    first.publish()
    first.close()
    second = SharedMetricsWriter(shared_file.path, [*series, ("sdit_learning_rate", ())])
    second.add("sdit_steps_total", 1)
    second.publish()
    second.close()
    numbers = dict(shared_file.numbers())
    assert numbers["sdit_steps_total", ()][0] == 6
    assert math.isnan(numbers["sdit_grad_norm", ()][0]) and math.isnan(numbers["sdit_learning_rate", ()][0])
