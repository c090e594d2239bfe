"""The report's section on speed: throughput, and the time spent on each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from sdit.report.elements import Bar, Section, rows, side_by_side
from sdit.report.figures import curve_cards, lines_of
from sdit.report.record import RunRecord
from sdit.report.values import curve, is_number, mean, seconds, short

SPENT = "spent_since_logged"
CURVES = (
    ("images_per_second", "Throughput", "images / s"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "global gradient norm"),
    ("model_flops_utilization", "Model FLOP/s utilization", "fraction of the peak"),
)
BY_RUN = (  # title, axis, factor, curves
    ("Time of a step", "seconds", 1.0, (
        ("step_seconds", "whole step"), ("rank_step_seconds_p99", "work of a rank, p99"),
        ("rank_step_seconds_p50", "work of a rank, median"),
    )),
    ("Bytes exchanged per step", "MB, all ranks", 1e-6, (
        ("exchange_bytes_tokens", "samples"), ("exchange_bytes_weights", "weights"),
    )),
    ("Memory of rank 0", "GB", 1e-9, (("memory_bytes.resident", "host"), ("memory_bytes.device", "device"))),
)  # fmt: skip


def speed_section(runs: Sequence[RunRecord]) -> Section:
    """Return curves of speed, and a bar with the time spent on each task."""
    split = side_by_side(runs, "Time by task", _split)
    lines = [
        side_by_side(runs, title, partial(lines_of, keys=keys, y_label=label, scale=scale))
        for title, label, scale, keys in BY_RUN
    ]
    return Section("speed", "Speed", "Speed", rows(runs, split, curve_cards(runs, CURVES), *lines))


def time_by_task(run: RunRecord) -> list[tuple[str, float, str]]:
    """Return (name, seconds, colour) of each task of rank 0, over all logged intervals."""
    records = [record[SPENT] for record in run.metrics if isinstance(record.get(SPENT), Mapping)] or run.metrics

    def total(key: str) -> float:
        return sum(record[f"{key}_seconds"] for record in records if is_number(record.get(f"{key}_seconds")))

    waiting, working, exchanging, updating = map(total, ("data_wait", "forward_backward", "exchange_wait", "optimizer"))
    rest = total("step") - waiting - max(working, exchanging) - updating
    tasks = [
        ("waiting for data", waiting, "c1"),
        ("forward and backward", max(0.0, working - exchanging), "c0"),
        ("waiting for the exchange of experts", exchanging, "c4"),
        ("optimizer and EMA", updating, "c2"),
        ("rest of the step", max(0.0, rest), "c7"),
        ("checkpoints", total("checkpoint"), "c3"),
        ("sample grids", total("sample"), "c5"),
        ("held-out loss", total("validation"), "c6"),
    ]
    return [task for task in tasks if task[1] > 0]


def speed_of(run: RunRecord) -> str:
    """Return images per second over the second half of the run, after the warm-up."""
    _, rates = curve(run.metrics, "images_per_second")
    rate = mean(rates[len(rates) // 2 :])
    return "—" if rate is None else short(round(rate, 1))


def _split(run: RunRecord) -> Bar | None:
    tasks = time_by_task(run)
    total = sum(amount for _, amount, _ in tasks)
    whole = any(isinstance(record.get(SPENT), Mapping) for record in run.metrics)
    note = "Rank 0, all steps up to the last logged one." if whole else "Rank 0, only the logged steps."
    segments = [(name, seconds(amount), amount / total, colour) for name, amount, colour in tasks]
    return Bar(segments, note) if segments else None
