"""Converts the shared metrics files of the local ranks to Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sdit.metrics.shared_file import RankStatus, Series, SharedMetricsFile
from sdit.metrics.specs import METRICS, RUN_STATES, MetricSpec


class SharedMetricsCollector(Collector):
    """Reads the files at every scrape. Ranks that have ended or not written yet are skipped.

    `files` returns the paths of the local ranks' files. `disk` returns the free bytes of the run directory, or None.
    """

    def __init__(self, files: Callable[[], Sequence[Path]], disk: Callable[[], float | None]) -> None:
        self._files, self._disk = files, disk

    def collect(self) -> Iterator[Metric]:
        rows: dict[str, list[tuple[list[str], Sequence[float]]]] = {}
        for (name, labels), values in self._series():
            rows.setdefault(name, []).append((list(labels), values))
        for name, spec in METRICS.items():
            if name in rows:
                yield _metric(spec, rows[name])

    def statuses(self) -> list[RankStatus]:
        """Return the newest status of each local rank."""
        return [status for file in self._open_files() if (status := file.status()) is not None]

    def _open_files(self) -> Iterator[SharedMetricsFile]:
        for path in self._files():
            try:
                file = SharedMetricsFile.open(path)
            except OSError:  # the rank has ended since the attempt began
                continue
            with closing(file):
                yield file

    def _series(self) -> Iterator[tuple[Series, Sequence[float]]]:
        free_bytes = self._disk()
        if free_bytes is not None:
            yield ("sdit_disk_free_bytes", ()), [free_bytes]
        for file in self._open_files():
            status = file.status()
            if status is None:
                continue
            yield from _supervisor_series(status, time.monotonic())
            for (name, labels), values in file.numbers():
                rank_label = (str(status.rank),) if METRICS[name].by_rank else ()
                yield (name, (*labels, *rank_label)), values


def _supervisor_series(status: RankStatus, now: float) -> Iterator[tuple[Series, Sequence[float]]]:
    rank = str(status.rank)
    yield ("sdit_rank_up", (rank,)), [float(status.is_up)]
    yield ("sdit_rank_heartbeat_age_seconds", (rank,)), [now - status.progress_at]
    yield ("sdit_rank_tick_age_seconds", (rank,)), [now - status.alive_at]
    yield ("sdit_rank_deadline_seconds", (rank,)), [status.deadline_seconds]
    yield ("sdit_rank_step", (rank,)), [float(status.step)]
    yield ("sdit_preemptions_total", (rank,)), [float(status.preemptions)]
    for cause, count in status.ends.items():
        yield ("sdit_rank_ends_total", (cause, rank)), [float(count)]
    if status.rank == 0:
        yield ("sdit_restarts_total", ()), [float(status.restarts)]
        for state in RUN_STATES:
            yield ("sdit_run_state", (state,)), [float(status.state == state)]


def _metric(spec: MetricSpec, rows: Iterable[tuple[list[str], Sequence[float]]]) -> Metric:
    labels = [*spec.labels, *(["rank"] if spec.by_rank else [])]
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.text, labels=labels)
        for label_values, values in rows:
            bounds = [*map(str, spec.buckets), "+Inf"]
            histogram.add_metric(label_values, list(zip(bounds, accumulate(values), strict=False)), values[-1])
        return histogram
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    metric = kind(spec.name, spec.text, labels=labels)
    for label_values, values in rows:
        if values[0] == values[0]:  # NaN means unknown
            metric.add_metric(label_values, values[0])
    return metric
