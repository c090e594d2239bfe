"""Laws of the metrics page: whole at any instant, counters that never fall, bounded series, no harm to training."""

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

from sdit.config import Config
from sdit.configfile import load_config
from sdit.observe.metrics import BINS, MetricsPage, shown_blocks
from sdit.supervise.collector import PageCollector
from sdit.supervise.metric_page import Page, PageWriter, Watch, page_path, sweep_pages
from sdit.supervise.ranks import RankInfo
from sdit.train.clock import Clock
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
def page() -> Iterator[Page]:
    nonce = f"test-{os.getpid()}-{time.monotonic_ns()}"
    page = Page.create(nonce)
    yield page
    page.close()
    page.path.unlink(missing_ok=True)


def tiny(*overrides: str) -> Config:
    return load_config(str(ROOT / "tests" / "distributed" / "tiny.yaml"), list(overrides))


def watch(rank: int = 0) -> Watch:
    now = time.monotonic()
    return Watch(rank, True, 7, "training", 180.0, now - 3, now, now, restarts=1, ends={"exit": 1})


def samples(page: Page) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a scrape would say: (name, labels) -> value."""
    registry = CollectorRegistry()
    registry.register(PageCollector(lambda: [page.path], lambda: None))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(found: dict, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_write_that_was_cut_leaves_the_one_before_it(page: Page) -> None:
    for number in range(1, 6):
        page.values.write(b"x" * 100 * number)
        torn = Page.open(page.path)
        place = torn.values._place(number + 1)
        os.pwrite(torn._descriptor, b"\xff" * 50, place + 3)  # a writer that was killed while it wrote the next one
        assert torn.values.read() == b"x" * 100 * number
        torn.close()


def test_reader_sees_whole_pages_while_the_writer_runs_is_stopped_and_is_replaced(page: Page) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sdit.supervise.metric_page import PageWriter\n"
        "writer = PageWriter(Path(sys.argv[1]), "
        "[('sdit_steps_total', ()), ('sdit_images_total', ()), ('sdit_step_seconds', ())])\n"
        "while True:\n"
        "    writer.add('sdit_steps_total', 1); writer.add('sdit_images_total', 1)\n"
        "    writer.observe('sdit_step_seconds', 0.25); writer.publish()\n"
        "    time.sleep(0.0005)\n"
    )
    newest = 0.0
    for _ in range(2):  # the second process goes on where the first was killed
        writer = subprocess.Popen([sys.executable, "-c", code, str(page.path)], cwd=ROOT)
        try:
            deadline, seen = time.monotonic() + 60, 0
            while seen < 300 and time.monotonic() < deadline:
                before = newest
                newest = check_whole(page, newest)
                seen += newest > before
            os.kill(writer.pid, signal.SIGSTOP)
            assert check_whole(page, newest) >= newest
        finally:
            writer.kill()
            writer.wait()
        assert seen == 300, "the writer made no progress"
        newest = check_whole(page, newest)


def check_whole(page: Page, newest: float) -> float:
    numbers = dict(page.numbers())
    if not numbers:
        return newest
    steps = numbers["sdit_steps_total", ()][0]
    histogram = numbers["sdit_step_seconds", ()]
    assert steps == numbers["sdit_images_total", ()][0] == sum(histogram[:-1]) == histogram[-1] * 4
    assert steps >= newest
    return steps


def test_records_become_metrics_with_units_and_labels(page: Page, tmp_path: Path) -> None:
    page.post_watch(watch())
    observer = MetricsPage(tiny(), tmp_path, RankInfo(0, 2, 0, 2, "test"), page.path)
    observer.on_start(Clock(64, 2), 640, "")
    assert "sdit_grad_norm" not in {name for name, _ in samples(page)}, "what is not known yet is not served"
    observer.on_step(Clock(96, 3), record(RECORD))
    observer.on_step(Clock(128, 4), record(LOGGED, logged=True))
    observer.on_checkpoint(Clock(128, 4), tmp_path / "images-000000000096", 0.7)
    for kind in ("checkpoint_failed", "loss_spike", "skipped_step", "experts"):
        observer.on_event(Clock(128, 4), kind, "")
    found = samples(page)
    assert value(found, "sdit_steps_total") == 2 and value(found, "sdit_images_total") == 64
    assert value(found, "sdit_images_seen") == 128 and value(found, "sdit_images_goal") == 640
    assert value(found, "sdit_loss", part="total") == 1.5 and value(found, "sdit_loss", part="vlb") == 0.25
    assert value(found, "sdit_loss_by_timestep", bin=BINS[0]) == 0.5
    assert ("sdit_loss_by_timestep", (("bin", BINS[19]),)) not in found
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
    assert abs(value(found, "sdit_rank_heartbeat_age_seconds", rank="0") - 3) < 60
    assert value(found, "sdit_run_state", state="training") == 1.0 and value(found, "sdit_restarts_total") == 1.0


def test_histogram_is_cumulative_and_ends_with_its_count(page: Page) -> None:
    page.post_watch(watch())
    writer = PageWriter(page.path, SERIES)
    for seconds in (0.005, 0.01, 0.3, 1000.0):
        writer.observe("sdit_step_seconds", seconds)
    writer.publish()
    found = samples(page)
    buckets = {
        dict(labels)["le"]: count for (name, labels), count in found.items() if name == "sdit_step_seconds_bucket"
    }
    assert buckets["0.01"] == 2 and buckets["0.25"] == 2 and buckets["0.5"] == 3 and buckets["+Inf"] == 4
    assert value(found, "sdit_step_seconds_count") == 4 and value(found, "sdit_step_seconds_sum") == 1000.315
    writer.close()


def test_other_ranks_write_what_differs_between_ranks_alone(page: Page, tmp_path: Path) -> None:
    page.post_watch(watch(rank=1))
    observer = MetricsPage(tiny(), tmp_path, RankInfo(1, 2, 1, 2, "test"), page.path)
    observer.on_start(Clock(), 640, "")
    observer.on_step(Clock(32, 1), record(LOGGED, logged=True))
    assert all(("rank", "1") in labels for _, labels in samples(page))


@pytest.mark.parametrize(
    ("depth", "experts", "cap"), [(2, 4, 512), (28, 64, 512), (28, 64, 64), (28, 64, 63), (28, 8, 0), (1, 8, 8)]
)
def test_experts_have_at_most_so_many_series_over_the_whole_depth(depth: int, experts: int, cap: int) -> None:
    config = tiny(f"model.depth={depth}", f"model.experts.count={experts}", f"observe.metrics_experts={cap}")
    blocks = shown_blocks(config)
    assert len(blocks) == len(set(blocks)) == min(depth, cap // experts)
    if len(blocks) > 1:
        assert (blocks[0], blocks[-1]) == (0, depth - 1)


def test_no_series_has_the_step_or_anything_else_without_bound_as_a_label(page: Page, tmp_path: Path) -> None:
    page.post_watch(watch())
    observer = MetricsPage(tiny(), tmp_path, RankInfo(0, 1, 0, 1, "test"), page.path)
    observer.on_start(Clock(), 640, "")
    before = set()
    for step in range(1, 4):
        observer.on_step(Clock(32 * step, step), record(LOGGED, logged=True))
        before = before or set(samples(page))
        assert set(samples(page)) == before


def test_full_shared_memory_is_told_once_and_stops_nothing(
    page: Page, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = MetricsPage(tiny(), tmp_path, RankInfo(0, 1, 0, 1, "test"), page.path)
    observer.on_start(Clock(), 640, "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write beyond it fails as on a full file system
    try:
        for step in range(1, 4):
            observer.on_step(Clock(32 * step, step), record(LOGGED, logged=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.message.split(":")[0] for record in caplog.records] == ["no metrics of this rank any more"]


def test_pages_of_dead_supervisors_are_swept_and_those_of_living_ones_stay(page: Page) -> None:
    nonce = f"dead-{os.getpid()}-{time.monotonic_ns()}"
    Page.create(nonce).close()
    for path in (page_path(nonce), page.path):
        os.utime(path, (0, 0))
    sweep_pages()
    assert page.path.exists() and not page_path(nonce).exists()


def test_unknown_stays_unknown_over_a_restart_and_counters_go_on(page: Page) -> None:
    series = [("sdit_steps_total", ()), ("sdit_grad_norm", ())]
    first = PageWriter(page.path, series)
    first.add("sdit_steps_total", 5)
    first.publish()
    first.close()
    second = PageWriter(page.path, [*series, ("sdit_learning_rate", ())])
    second.add("sdit_steps_total", 1)
    second.publish()
    second.close()
    numbers = dict(page.numbers())
    assert numbers["sdit_steps_total", ()][0] == 6
    assert math.isnan(numbers["sdit_grad_norm", ()][0]) and math.isnan(numbers["sdit_learning_rate", ()][0])
