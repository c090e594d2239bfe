"""Throughput, and what the time was spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdit.report.figures import Series, line_chart, together
from sdit.report.parts import Bar, Card, Part, Section, rows, side_by_side
from sdit.report.record import RunRecord
from sdit.report.values import curve, is_number, mean, seconds, short

SPENT = "spent_since_logged"
CURVES = (
    ("images_per_second", "Throughput", "images / s"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "global gradient norm"),
    ("model_flops_utilization", "Model FLOP/s utilization", "share of the peak"),
)
STEP_TIMES = (
    ("step_seconds", "whole step", "c0"),
    ("rank_step_seconds_p99", "own work, p99 of the ranks", "c1"),
    ("rank_step_seconds_p50", "own work, median rank", "c2"),
)


def speed_section(runs: Sequence[RunRecord]) -> Section:
    """Return curves of speed, and a bar of what the time was spent on."""
    curves = []
    for key, title, label in CURVES:
        chart = together(runs, key, label, plain=key == "learning_rate")
        curves += [Card(title, [chart])] if chart is not None else []
    split = side_by_side(runs, "Where the time went", _split)
    step = side_by_side(runs, "Time of a step", _step)
    memory = side_by_side(runs, "Memory of rank 0", _memory)
    exchange = side_by_side(runs, "Bytes exchanged per step", _exchange)
    return Section("speed", "Speed", "Speed", rows(runs, split, curves, step, exchange, memory))


def time_parts(run: RunRecord) -> list[tuple[str, float, str]]:
    """Return (name, seconds, colour) of what rank 0 spent its time on, over all logged intervals."""
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


def speed_of(run: RunRecord) -> str:
    """Return images per second over the second half of the run, after the warm-up."""
    _, rates = curve(run.metrics, "images_per_second")
    rate = mean(rates[len(rates) // 2 :])
    return "—" if rate is None else short(round(rate, 1))


def _split(run: RunRecord) -> Bar | None:
    parts = time_parts(run)
    total = sum(amount for _, amount, _ in parts)
    whole = any(isinstance(record.get(SPENT), Mapping) for record in run.metrics)
    note = "Rank 0, all steps up to the last logged one." if whole else "Rank 0, only the logged steps."
    pieces = [(name, seconds(amount), amount / total, colour) for name, amount, colour in parts]
    return Bar(pieces, note) if pieces else None


def _step(run: RunRecord) -> Part | None:
    series = [Series(label, *curve(run.metrics, key), colour) for key, label, colour in STEP_TIMES]
    return line_chart(series, "seconds") if any(one.xs for one in series) else None


def _memory(run: RunRecord) -> Part | None:
    series = []
    for key, label, colour in (("resident", "host", "c0"), ("device", "device", "c1")):
        records = [
            {"images_seen": record["images_seen"], "bytes": memory[key] / 1e9}
            for record in run.metrics
            if isinstance(memory := record.get("memory_bytes"), Mapping)
            and is_number(memory.get(key))
            and memory[key] > 0
        ]
        series += [Series(label, *curve(records, "bytes"), colour, plain=True)] if records else []
    return line_chart(series, "GB") if series else None


def _exchange(run: RunRecord) -> Part | None:
    series = []
    for key, label, colour in (
        ("exchange_bytes_tokens", "samples", "c4"), ("exchange_bytes_weights", "weights", "c5"),
    ):  # fmt: skip
        xs, ys = curve(run.metrics, key)
        series += [Series(label, xs, [y / 1e6 for y in ys], colour, plain=True)] if any(ys) else []
    return line_chart(series, "MB, all ranks") if series else None
