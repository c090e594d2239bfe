"""What the sections of the page share: which run has which colour, and moments that curves are marked with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdit.observe.report.charts import Mark, Series, line_chart
from sdit.observe.report.html import Html, card, grid, tag
from sdit.observe.report.numbers import curve, is_number
from sdit.observe.report.record import RunRecord

COLOURS = 8  # of the style sheet, c0 to c7; the ninth run has the first one's


def colour_of(number: int) -> str:
    return f"c{number % COLOURS}"


def run_tag(runs: Sequence[RunRecord], number: int) -> Html | None:
    """The name of a run with its colour; None where there is only one."""
    if len(runs) == 1:
        return None
    return tag("span", tag("i", style=f"background:var(--{colour_of(number)})"), runs[number].name, class_="dot")


def side_by_side(
    runs: Sequence[RunRecord], title: str, draw: Callable[[RunRecord], Html | None], note: str = "",
    among: Sequence[RunRecord] | None = None,
) -> list[Html]:  # fmt: skip
    """One card per run (of those `among` them), so that columns stay whole; none where no run has something to show."""
    bodies = {number: draw(run) for number, run in enumerate(runs) if among is None or run in among}
    if all(body is None for body in bodies.values()):
        return []
    nothing = tag("p", "not in this run", class_="empty")
    return [
        card(title, nothing if body is None else body, note="" if body is None else note, run=run_tag(runs, number))
        for number, body in bodies.items()
    ]


def rows(runs: Sequence[RunRecord], *groups: list[Html]) -> list[Html]:
    """Of one run all cards share rows; of several, each group has a row of its own."""
    if len(runs) == 1:
        cards = [one for group in groups for one in group]
        return [grid(*cards)] if cards else []
    return [grid(*group, class_="grid two" if len(group) == 2 else "grid") for group in groups if group]


def together(
    runs: Sequence[RunRecord], key: str, y_label: str, log_y: bool = False, from_zero: bool = False, plain: bool = False
) -> Html | None:
    """One curve per run of a key of metrics.jsonl, `plain` ones as they are; None if no run has it."""
    series = [
        Series(run.name, *curve(run.metrics, key), colour_of(number), plain=plain) for number, run in enumerate(runs)
    ]
    if not any(len(one.xs) for one in series):
        return None
    return line_chart(series, y_label, log_y=log_y, from_zero=from_zero)


def moments(run: RunRecord) -> list[Mark]:
    """Restarts and skipped steps on the axis of images."""
    kinds = {
        "start": ("restart", "bad"),
        "skipped_step": ("skipped step", "warn"),
        "loss_spike": ("loss spike", "warn"),
    }
    found = []
    for event in run.events:
        name, colour = kinds.get(str(event.get("event")), ("", ""))
        images = event.get("images_seen")
        if name and is_number(images) and not (name == "restart" and event is run.events[0]):
            found.append(Mark(float(images), f"{name}: {event.get('text', '')}", colour))  # type: ignore[arg-type]
    return found
