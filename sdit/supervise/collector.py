"""From the local ranks' pages to Prometheus' metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sdit.supervise.metric_families import FAMILIES, RUN_STATES, Family
from sdit.supervise.metric_page import Page, Series, Watch


class PageCollector(Collector):
    """Reads the pages at every scrape. Those of ranks that have gone, or not yet written, are left out."""

    def __init__(self, pages: Callable[[], Sequence[Path]], disk: Callable[[], float | None]) -> None:
        self._pages, self._disk = pages, disk

    def collect(self) -> Iterator[Metric]:
        rows: dict[str, list[tuple[list[str], Sequence[float]]]] = {}
        for (name, labels), values in self._series():
            rows.setdefault(name, []).append((list(labels), values))
        for name, family in FAMILIES.items():
            if name in rows:
                yield _metric(family, rows[name])

    def watches(self) -> list[Watch]:
        """What the local supervisors last wrote."""
        found = []
        for page in self._open_pages():
            watch = page.watch()
            if watch is not None:
                found.append(watch)
        return found

    def _open_pages(self) -> Iterator[Page]:
        for path in self._pages():
            try:
                page = Page.open(path)
            except OSError:  # it has gone since the plan was posted
                continue
            try:
                yield page
            finally:
                page.close()

    def _series(self) -> Iterator[tuple[Series, Sequence[float]]]:
        free_bytes = self._disk()
        if free_bytes is not None:
            yield ("sdit_disk_free_bytes", ()), [free_bytes]
        for page in self._open_pages():
            watch = page.watch()
            if watch is None:
                continue
            yield from _of_supervisor(watch, time.monotonic())
            for (name, labels), values in page.numbers():
                own = (str(watch.rank),) if FAMILIES[name].by_rank else ()
                yield (name, (*labels, *own)), values


def _of_supervisor(watch: Watch, now: float) -> Iterator[tuple[Series, Sequence[float]]]:
    rank = str(watch.rank)
    yield ("sdit_rank_up", (rank,)), [float(watch.is_up)]
    yield ("sdit_rank_heartbeat_age_seconds", (rank,)), [now - watch.progress_at]
    yield ("sdit_rank_tick_age_seconds", (rank,)), [now - watch.tick_at]
    yield ("sdit_rank_deadline_seconds", (rank,)), [watch.deadline_seconds]
    yield ("sdit_rank_step", (rank,)), [float(watch.step)]
    yield ("sdit_preemptions_total", (rank,)), [float(watch.preemptions)]
    for cause, count in watch.ends.items():
        yield ("sdit_rank_ends_total", (cause, rank)), [float(count)]
    if watch.rank == 0:
        yield ("sdit_restarts_total", ()), [float(watch.restarts)]
        for state in RUN_STATES:
            yield ("sdit_run_state", (state,)), [float(watch.state == state)]


def _metric(family: Family, rows: Iterable[tuple[list[str], Sequence[float]]]) -> Metric:
    labels = [*family.labels, *(["rank"] if family.by_rank else [])]
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.text, labels=labels)
        for own, values in rows:
            histogram.add_metric(own, list(_cumulative(family.buckets, values)), values[-1])
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.text, labels=labels)
    for own, values in rows:
        if values[0] == values[0]:  # NaN: not known yet
            metric.add_metric(own, values[0])
    return metric


def _cumulative(buckets: Sequence[float], counts: Sequence[float]) -> Iterator[tuple[str, float]]:
    total = 0.0
    for bound, count in zip([*(str(bound) for bound in buckets), "+Inf"], counts, strict=False):
        total += count
        yield bound, total
