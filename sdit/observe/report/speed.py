"""Throughput, and what the time went into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdit.observe.report.charts import Series, line_chart, split_bar
from sdit.observe.report.html import Html, card, join, section, tag
from sdit.observe.report.numbers import curve, is_number, seconds, short
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import rows, side_by_side, together

SPENT = "spent_since_logged"


def speed_section(runs: Sequence[RunRecord]) -> Html:
    """Curves of speed, and bars of the time's parts."""
    curves = []
    for key, title, label, from_zero in (
        ("images_per_second", "Throughput", "images / s", True),
        ("learning_rate", "Learning rate", "learning rate", True),
        ("grad_norm", "Gradient norm", "global gradient norm", True),
        ("model_flops_utilization", "Model FLOP/s utilization", "share of the peak", True),
    ):
        chart = together(runs, key, label, from_zero=from_zero, plain=key == "learning_rate")
        if chart is not None:
            curves.append(card(title, chart))
    split = side_by_side(runs, "Where the time went", _split)
    step = side_by_side(runs, "Time of a step", _step)
    memory = side_by_side(runs, "Memory of rank 0", _memory)
    exchange = side_by_side(runs, "Bytes exchanged per step", _exchange)
    return section("speed", "Speed", *rows(runs, split, curves, step, exchange, memory))


def time_parts(run: RunRecord) -> list[tuple[str, float, str]]:
    """(name, seconds, colour) of what rank 0's time went into, over all logged intervals."""
    records = [record[SPENT] for record in run.metrics if isinstance(record.get(SPENT), Mapping)] or run.metrics

    def total(key: str) -> float:
        return sum(record[f"{key}_seconds"] for record in records if is_number(record.get(f"{key}_seconds")))

    waiting, working, exchanging, updating = map(total, ("data_wait", "forward_backward", "exchange_wait", "optimizer"))
    rest = total("step") - waiting - max(working, exchanging) - updating
    parts = [
        ("waiting for data", waiting, "c1"),
        ("forward and backward", max(0.0, working - exchanging), "c0"),
        ("waiting for the exchange of experts", exchanging, "c4"),
        ("optimizer and EMA", updating, "c2"),
        ("rest of the step", max(0.0, rest), "c7"),
        ("checkpoints", total("checkpoint"), "c3"),
        ("sample grids", total("sample"), "c5"),
        ("held-out loss", total("validation"), "c6"),
    ]
    return [part for part in parts if part[1] > 0]


def _split(run: RunRecord) -> Html | None:
    parts = time_parts(run)
    if not parts:
        return None
    whole = any(isinstance(record.get(SPENT), Mapping) for record in run.metrics)
    scope = "Rank 0, all steps up to the last logged one." if whole else "Rank 0, logged steps alone."
    return join([split_bar(parts, seconds), tag("p", scope, class_="note")])


def _step(run: RunRecord) -> Html | None:
    series = [
        Series(label, *curve(run.metrics, key), colour)
        for key, label, colour in (
            ("step_seconds", "whole step", "c0"),
            ("rank_step_seconds_p99", "own work, p99 of the ranks", "c1"),
            ("rank_step_seconds_p50", "own work, median rank", "c2"),
        )
    ]
    return line_chart(series, "seconds", from_zero=True) if any(one.xs for one in series) else None


def _memory(run: RunRecord) -> Html | None:
    series = []
    for key, label, colour in (("resident", "host", "c0"), ("device", "device", "c1")):
        records = [
            {"images_seen": record["images_seen"], "bytes": memory[key] / 1e9}
            for record in run.metrics
            if isinstance(memory := record.get("memory_bytes"), Mapping)
            and is_number(memory.get(key))
            and memory[key] > 0
        ]
        if records:
            series.append(Series(label, *curve(records, "bytes"), colour, plain=True))
    return line_chart(series, "GB", from_zero=True) if series else None


def _exchange(run: RunRecord) -> Html | None:
    series = []
    for key, label, colour in (
        ("exchange_bytes_tokens", "samples", "c4"), ("exchange_bytes_weights", "weights", "c5"),
    ):  # fmt: skip
        xs, ys = curve(run.metrics, key)
        if any(ys):
            series.append(Series(label, xs, [y / 1e6 for y in ys], colour, plain=True))
    return line_chart(series, "MB, all ranks", from_zero=True) if series else None


def speed_of(run: RunRecord) -> str:
    """Images per second over the second half of the run: beyond warm-up."""
    _, rates = curve(run.metrics, "images_per_second")
    recent = rates[len(rates) // 2 :]
    return short(round(sum(recent) / len(recent), 1)) if recent else "—"
