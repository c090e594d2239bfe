"""The report's section on losses: by loss term, by timestep, in training and on held-out images."""

from __future__ import annotations

from collections.abc import Sequence

from sdit.report.elements import Card, Element, Section, rows, side_by_side
from sdit.report.figures import Mark, Series, line_chart, lines_of, together
from sdit.report.record import RunRecord
from sdit.report.values import curve, is_number, mean

TERMS = (
    ("loss", "total"), ("mse", "mse"), ("vlb", "vlb"), ("prior_loss", "prior"), ("balance_loss", "balance"),
    ("direction_loss", "direction"), ("contrastive_loss", "contrastive"),
)  # fmt: skip
BANDS = 5  # number of curves; twenty could not be distinguished
MARKS = {"start": ("restart", "bad"), "skipped_step": ("skipped step", "warn"), "loss_spike": ("loss spike", "warn")}


def loss_section(runs: Sequence[RunRecord]) -> Section:
    """Return curves over images, and the final profile over timesteps."""
    shared = []
    for key, title in (("loss", "Training loss"), ("validation_loss", "Held-out loss")):
        chart = together(runs, key, f"{title.lower()} (log)", log_y=True)
        if chart is not None and (len(runs) > 1 or key == "validation_loss"):
            shared.append(Card(title, [chart]))
    terms = side_by_side(
        runs, "Training loss by term", lambda run: lines_of(run, TERMS, "loss (log)", log_y=True, marks=marks_of(run))
    )
    bands = side_by_side(runs, "Training error by timestep", lambda run: _bands(run, "loss_by_timestep"))
    held_out = side_by_side(runs, "Held-out error by timestep", lambda run: _bands(run, "validation_loss_by_timestep"))
    profile = side_by_side(runs, "Error over timesteps, at the end", _profile)
    first = (terms, shared) if len(runs) == 1 else (shared, terms)
    return Section("loss", "Loss", "Loss", rows(runs, *first, bands, held_out, profile))


def marks_of(run: RunRecord) -> list[Mark]:
    """Return restarts, skipped steps and loss spikes on the axis of images."""
    found = []
    for event in run.events:
        kind, colour = MARKS.get(str(event.get("event")), ("", ""))
        images = event.get("images_seen")
        if kind and is_number(images) and not (kind == "restart" and event is run.events[0]):
            found.append(Mark(float(images), kind, f"{kind}: {event.get('text', '')}", colour))
    return found


def _bands(run: RunRecord, key: str) -> Element | None:
    """Return means of neighbouring bins over images. The lowest band has the least noise."""
    records = [record for record in run.metrics if isinstance(record.get(key), list)]
    if not records:
        return None
    bins = max(len(record[key]) for record in records)
    series = []
    for band in range(min(BANDS, bins)):
        low, high = band * bins // BANDS, max(band * bins // BANDS + 1, (band + 1) * bins // BANDS)
        means = [{"images_seen": record["images_seen"], "mean": mean(record[key][low:high])} for record in records]
        label = f"{100 * low // bins} to {100 * high // bins} % of T"
        series.append(Series(label, *curve(means, "mean"), f"s{band}"))
    return line_chart(series, "mean squared error (log)", log_y=True)


def _profile(run: RunRecord) -> Element | None:
    """Return the error of the last records in each bin of the timestep."""
    series = []
    for key, label, colour, count in (
        ("loss_by_timestep", "training", "c0", 10), ("validation_loss_by_timestep", "held-out", "c1", 1),
    ):  # fmt: skip
        recent = [record[key] for record in run.metrics if isinstance(record.get(key), list)][-count:]
        bins = max(map(len, recent), default=0)
        means = [mean([record[position] for record in recent if position < len(record)]) for position in range(bins)]
        points = [(100 * (position + 0.5) / bins, value) for position, value in enumerate(means) if value is not None]
        series += [Series(label, [x for x, _ in points], [y for _, y in points], colour)] if recent else []
    if not series:
        return None
    return line_chart(series, "mean squared error (log)", "timestep, % of T (0: least noise)", log_y=True)
