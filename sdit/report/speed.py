"""Throughput, and what the time was spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from sdit.report.figures import lines_of, together
from sdit.report.parts import Bar, Card, Section, rows, side_by_side
from sdit.report.record import RunRecord
from sdit.report.values import curve, is_number, mean, seconds, short

SPENT = "spent_since_logged"
CURVES = (
    ("images_per_second", "Throughput", "images / s"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "global gradient norm"),
    ("model_flops_utilization", "Model FLOP/s utilization", "share of the peak"),
)
BY_RUN = (  # title, axis, factor, curves
    ("Time of a step", "seconds", 1.0, (
        ("step_seconds", "whole step"), ("rank_step_seconds_p99", "own work, p99 of the ranks"),
        ("rank_step_seconds_p50", "own work, median rank"),
    )),
    ("Bytes exchanged per step", "MB, all ranks", 1e-6, (
        ("exchange_bytes_tokens", "samples"), ("exchange_bytes_weights", "weights"),
    )),
    ("Memory of rank 0", "GB", 1e-9, (("memory_bytes.resident", "host"), ("memory_bytes.device", "device"))),
)  # fmt: skip


def speed_section(runs: Sequence[RunRecord]) -> Section:
    """Return curves of speed, and a bar of what the time was spent on."""
    charts = [(title, together(runs, key, label)) for key, title, label in CURVES]
    curves = [Card(title, [chart]) for title, chart in charts if chart is not None]
    split = side_by_side(runs, "Where the time went", _split)
    lines = [
        side_by_side(runs, title, partial(lines_of, keys=keys, y_label=label, scale=scale))
        for title, label, scale, keys in BY_RUN
    ]
    return Section("speed", "Speed", "Speed", rows(runs, split, curves, *lines))


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
