"""The elements of a page. The template has one macro for each kind of element and escapes all text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from sdit.report.record import RunRecord

COLOURS = 8  # c0 to c7 of the style sheet, then c0 again


@dataclass(frozen=True)
class Chart:
    """A figure with a legend. `scale`: lowest value, CSS gradient, highest value."""

    kind: ClassVar = "chart"
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()
    scale: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells. The template folds rows after the fortieth. If `summary` is set, the whole table is folded."""

    kind: ClassVar = "table"
    rows: Sequence[Sequence[object]]
    head: Sequence[object] = ()
    css: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar with segments (name, amount, fraction in 0 to 1, colour)."""

    kind: ClassVar = "bar"
    segments: Sequence[tuple[str, str, float, str]]
    note: str


@dataclass(frozen=True)
class Frames:
    """Figures in a row: (caption, images as (data URI, alternative text)). `css` is `map` for heat maps."""

    kind: ClassVar = "frames"
    frames: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    css: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph (`note`, `empty`) or a heading in a card (`h3`)."""

    kind: ClassVar = "text"
    text: str
    css: str = "note"


Element = Chart | Table | Bar | Frames | Text


@dataclass(frozen=True)
class Card:
    """A titled box. `run` is the number of the run that it shows, None if it shows all runs."""

    title: str
    elements: Sequence[Element]
    run: int | None = None


@dataclass(frozen=True)
class Grid:
    """Cards in rows: as many per row as fit, two (`two`), or one (`wide`)."""

    cards: Sequence[Card]
    css: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page with a link in the navigation. It is omitted if it has no grids."""

    name: str
    link: str
    title: str
    grids: Sequence[Grid]


def colour_of(number: int) -> str:
    """Return the name of the colour of a run."""
    return f"c{number % COLOURS}"


def badge(text: str, kind: str) -> Markup:
    """Return a small label; `kind` is good, bad, warn or plain."""
    return Markup('<span class="badge {}">{}</span>').format(kind, text)


def side_by_side(
    runs: Sequence[RunRecord], title: str, draw: Callable[[RunRecord], Element | None], note: str = "",
    among: Sequence[RunRecord] | None = None,
) -> list[Card]:  # fmt: skip
    """Return one card per run (of those `among` them), so that columns stay aligned. Return no card if no run has a value."""
    bodies = {number: draw(run) for number, run in enumerate(runs) if among is None or run in among}
    if all(body is None for body in bodies.values()):
        return []
    notes = [Text(note)] if note else []
    return [
        Card(title, [Text("not in this run", "empty")] if body is None else [body, *notes], number)
        for number, body in bodies.items()
    ]


def rows(runs: Sequence[RunRecord], *groups: list[Card]) -> list[Grid]:
    """Return one grid for one run. For several runs, return one grid for each group."""
    if len(runs) == 1:
        cards = [card for group in groups for card in group]
        return [Grid(cards)] if cards else []
    return [Grid(group, "two" if len(group) == 2 else "") for group in groups if group]


def list_grid(runs: Sequence[RunRecord], cards: Sequence[Card]) -> list[Grid]:
    """Return a grid of lists. A single run gets the full width."""
    return [Grid(cards, "" if len(runs) > 1 else "wide")] if cards else []
