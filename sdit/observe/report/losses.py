"""The losses: by part, by timestep, in training and on held-out images."""

from __future__ import annotations

from collections.abc import Sequence

from sdit.observe.report.charts import Series, line_chart
from sdit.observe.report.html import Html, card, section
from sdit.observe.report.numbers import curve, is_number
from sdit.observe.report.record import RunRecord
from sdit.observe.report.shared import moments, rows, side_by_side, together

PARTS = {"loss": "total", "mse": "mse", "vlb": "vlb", "prior_loss": "prior", "balance_loss": "balance"}
BANDS = 5  # curves over the timestep's bins; twenty could not be told apart


def loss_section(runs: Sequence[RunRecord]) -> Html:
    """Curves over images, and the profile over timesteps at the end."""
    shared = []
    for key, title in (("loss", "Training loss"), ("validation_loss", "Held-out loss")):
        chart = together(runs, key, f"{title.lower()} (log)", log_y=True)
        if chart is not None and (len(runs) > 1 or key == "validation_loss"):
            shared.append(card(title, chart))
    parts = side_by_side(runs, "Training loss by part", _parts)
    bands = side_by_side(runs, "Training error by timestep", lambda run: _bands(run, "loss_by_timestep"))
    held_out = side_by_side(runs, "Held-out error by timestep", lambda run: _bands(run, "validation_loss_by_timestep"))
    profile = side_by_side(runs, "Error over timesteps, at the end", _profile)
    if len(runs) == 1:
        return section("loss", "Loss", *rows(runs, parts, shared, bands, held_out, profile))
    return section("loss", "Loss", *rows(runs, shared, parts, bands, held_out, profile))


def _parts(run: RunRecord) -> Html | None:
    series = []
    for number, (key, label) in enumerate(PARTS.items()):
        xs, ys = curve(run.metrics, key)
        if any(y > 0 for y in ys):
            series.append(Series(label, xs, ys, f"c{number}"))
    return line_chart(series, "loss (log)", log_y=True, marks=moments(run)) if series else None


def _bands(run: RunRecord, key: str) -> Html | None:
    """Means of neighbouring bins over images; the lowest band is the least noise."""
    records = [record for record in run.metrics if isinstance(record.get(key), list)]
    if not records:
        return None
    bins = max(len(record[key]) for record in records)
    series = []
    for band in range(min(BANDS, bins)):
        low, high = band * bins // BANDS, max(band * bins // BANDS + 1, (band + 1) * bins // BANDS)
        means = [{"images_seen": record["images_seen"], "mean": _mean(record[key][low:high])} for record in records]
        label = f"{100 * low // bins} to {100 * high // bins} % of T"
        series.append(Series(label, *curve(means, "mean"), f"s{band}"))
    return line_chart(series, "mean squared error (log)", log_y=True)


def _profile(run: RunRecord) -> Html | None:
    """The last records' error in each bin of the timestep."""
    series = []
    for key, label, colour in (
        ("loss_by_timestep", "training", "c0"), ("validation_loss_by_timestep", "held-out", "c1"),
    ):  # fmt: skip
        records = [record[key] for record in run.metrics if isinstance(record.get(key), list)]
        recent = records[-10:] if key == "loss_by_timestep" else records[-1:]
        if not recent:
            continue
        bins = max(len(record) for record in recent)
        means = [_mean([record[place] for record in recent if place < len(record)]) for place in range(bins)]
        points = [(100 * (place + 0.5) / bins, mean) for place, mean in enumerate(means) if mean is not None]
        series.append(Series(label, [x for x, _ in points], [y for _, y in points], colour, plain=True))
    if not series:
        return None
    return line_chart(series, "mean squared error (log)", "timestep, % of T (0: least noise)", log_y=True)


def _mean(values: Sequence[object]) -> float | None:
    numbers = [float(value) for value in values if is_number(value)]  # type: ignore[arg-type]
    return sum(numbers) / len(numbers) if numbers else None
