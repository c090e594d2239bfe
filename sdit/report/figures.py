"""Draws charts and heat maps as inline SVG with matplotlib, in the colours of the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sdit.report.elements import Card, Chart, Element, RunRecord, Text, colour_of
from sdit.report.values import curve, short

WIDTH, HEIGHT, MAP_HEIGHT = 420, 250, 280  # of the view box; one unit is one point of matplotlib
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 42
IMAGES = "images seen"
MAX_POINTS = 240  # of a curve
SMOOTH_POINTS = 40  # longer curves are noisy, so a line of means is drawn over a faint line
# matplotlib draws in marker colours #fe00NN. In the page, marker NN is replaced by variable NN of this list.
VARIABLES = ("text", "soft", "line", "grid", "bad", "warn", *(f"c{n}" for n in range(8)), *(f"s{n}" for n in range(5)))
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "sdit", "text.parse_math": False, "path.simplify": False}
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Series:
    """A curve. `colour` is the name of a variable of the style sheet."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Mark:
    """A vertical line at an event, such as a restart. `text` is its tooltip, `kind` its name in the legend."""

    x: float
    kind: str
    text: str
    colour: str = "bad"


def line_chart(
    series: Sequence[Series], y_label: str, x_label: str = IMAGES, log_y: bool = False, marks: Sequence[Mark] = (),
    top: float | None = None,
) -> Element:  # fmt: skip
    """Return curves in one chart, or a sentence if there are no values. Without `log_y` the axis starts at 0."""
    shown = []
    for one in series:
        points = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y > 0 or not log_y]
        shown += [replace(one, xs=[x for x, _ in points], ys=[y for _, y in points])] if points else []
    if not shown:
        return Text("no values", "empty")
    first = 0.0 if x_label == IMAGES else min(min(one.xs) for one in shown)
    last = max(max(one.xs) for one in shown)
    low, high = _limits(shown, log_y, top)
    marks = [mark for mark in marks if first <= mark.x <= last]
    with style.context(["default", STYLE]):
        figure, axes = _axes(HEIGHT, x_label, y_label)
        if log_y:
            axes.set_yscale("log")
        axes.set(xlim=(first, last if last > first else first + 1), ylim=(low, high))
        _ticks(axes, high / low if log_y else None)
        for number, mark in enumerate(marks):
            line = axes.axvline(mark.x, color=_marker(mark.colour), linestyle=(0, (2, 3)), linewidth=1.2, clip_on=False)
            line.set_gid(f"mark-{number}")
        for one in shown:
            _plot(axes, one, low, high)
        label = f"{y_label} over {x_label}: {', '.join(one.label for one in shown)}"
        svg = _inline(figure, label, {f"mark-{number}": mark.text for number, mark in enumerate(marks)})
    names = [(one.label, one.colour) for one in shown] if len(shown) > 1 else []
    return Chart(svg, [*names, *{mark.kind: mark.colour for mark in marks}.items()])


def together(
    runs: Sequence[RunRecord], key: str, y_label: str, log_y: bool = False, constant: bool = True
) -> Element | None:
    """Return one curve per run for a key of metrics.jsonl.

    Return None if no run has the key, or if `constant` is False and all curves are constant.
    """
    series = [Series(run.name, *curve(run.metrics, key), colour_of(number)) for number, run in enumerate(runs)]
    is_shown = any(one.ys if constant else len(set(one.ys)) > 1 for one in series)
    return line_chart(series, y_label, log_y=log_y) if is_shown else None


def curve_cards(runs: Sequence[RunRecord], curves: Sequence[tuple[str, str, str]], constant: bool = True) -> list[Card]:
    """Return a card for each (key, title, label of the axis) that `together` draws."""
    charts = [(title, together(runs, key, label, constant=constant)) for key, title, label in curves]
    return [Card(title, [chart]) for title, chart in charts if chart is not None]


def lines_of(
    run: RunRecord, keys: Sequence[tuple[str, str]], y_label: str, scale: float = 1.0, log_y: bool = False,
    marks: Sequence[Mark] = (),
) -> Element | None:  # fmt: skip
    """Return one curve, times `scale`, per (key of metrics.jsonl, label) with values other than 0.

    Return None if there is none.
    """
    series = []
    for number, (key, label) in enumerate(keys):
        xs, ys = curve(run.metrics, key)
        series += [Series(label, xs, [y * scale for y in ys], f"c{number}")] if any(ys) else []
    return line_chart(series, y_label, log_y=log_y, marks=marks) if series else None


def heat_map(
    rgb: np.ndarray, x_label: str, y_label: str, x_range: tuple[float, float] | None, y_range: tuple[float, float],
    scale: tuple[str, str, str] | None = None,
) -> Chart:  # fmt: skip
    """Return an image (rows, columns, 3) uint8 with axes. The ranges go from the first to the last column or row.

    `scale`: the text of the lowest value, the colour map of matplotlib, the text of the highest value.
    """
    with style.context(["default", STYLE]):
        figure, axes = _axes(MAP_HEIGHT, x_label, y_label)
        extent = (*(x_range or (0, 1)), *reversed(y_range))
        axes.imshow(rgb, aspect="auto", interpolation="none", extent=extent, clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if x_range else NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        svg = _inline(figure, f"{y_label} against {x_label}", {})
    if scale is None:
        return Chart(svg)
    stops = ",".join(to_hex(matplotlib.colormaps[scale[1]](position)) for position in np.linspace(0, 1, 5))
    return Chart(svg, scale=(scale[0], f"linear-gradient(90deg,{stops})", scale[2]))


def thin(
    xs: Sequence[float], ys: Sequence[float] | np.ndarray, points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `points` points. Each is the mean of neighbouring points, except the last point, which is kept."""
    curves = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if len(xs) <= points:
        return curves
    edges = np.linspace(0, len(xs) - 1, points).round().astype(np.int64)
    means = [np.append(np.add.reduceat(one[:-1], edges[:-1]) / np.diff(edges), one[-1]) for one in curves]
    return means[0], means[1]


def _limits(series: Sequence[Series], log_y: bool, top: float | None) -> tuple[float, float]:
    """Return the limits of the vertical axis. A few extreme values of long curves may be outside."""
    ordered = [sorted(one.ys) for one in series]
    bottom = min(ys[0] for ys in ordered)
    peak = max(ys[-1 - len(ys) // (100 if log_y else 50)] for ys in ordered)
    if log_y:
        return bottom * 0.9, max(peak, bottom) * 1.1
    low, high = min(0.0, bottom), max(peak, bottom) * 1.06 if top is None else top
    return low, high if high > low else low + 1.0


def _axes(height: int, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), frameon=False)
    box = (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, (height - TOP - BOTTOM) / height)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_marker("soft"))
    axes.tick_params(length=0, labelcolor=_marker("soft"), pad=6)
    axes.set_xlabel(x_label, color=_marker("text"))
    axes.set_ylabel(y_label, color=_marker("text"))
    axes.xaxis.set_label_coords(0.5, -28 / (height - TOP - BOTTOM))
    axes.yaxis.set_label_coords(-52 / (WIDTH - LEFT - RIGHT), 0.5)
    return figure, axes


def _ticks(axes: Any, ratio: float | None) -> None:
    """Set round ticks and the grid. `ratio` is the highest over the lowest value of a logarithmic axis."""
    steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=steps))
    if ratio is None or ratio < 3:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=steps))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 30 else (1, 3) if ratio < 1000 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.grid(axis="y", color=_marker("grid"), linewidth=1, clip_on=False)
    axes.set_axisbelow(True)


def _plot(axes: Any, one: Series, low: float, high: float) -> None:
    colour = _marker(one.colour)
    line = {"color": colour, "clip_on": False, "solid_joinstyle": "round", "solid_capstyle": "round"}
    xs, ys = thin(one.xs, np.clip(one.ys, low, high))
    if len(xs) == 1:  # a line of zero length is drawn as a dot
        axes.plot([xs[0], xs[0]], [ys[0], ys[0]], linewidth=6, **line)
    elif len(xs) <= SMOOTH_POINTS:
        axes.plot(xs, ys, linewidth=2, **line)
    else:
        axes.plot(xs, ys, linewidth=1, alpha=0.28, **line)
        axes.plot(*thin(one.xs, np.clip(one.ys, low, high), SMOOTH_POINTS), linewidth=2, **line)


def _marker(name: str) -> str:
    return f"#fe00{VARIABLES.index(name):02x}"


def _inline(figure: Figure, label: str, tooltips: dict[str, str]) -> Markup:
    """Return the SVG element of a figure without ids, fonts and fixed colours. `tooltips` are texts of groups, by id."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}defs" or (child.tag == f"{{{SVG}}}g" and not len(child)):
                parent.remove(child)
        tooltip = tooltips.get(parent.attrib.pop("id", ""))
        if tooltip is not None:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = tooltip
            parent.insert(0, title)
        _adapt(parent.attrib)
        parent.tail = None
        if parent.tag != f"{{{SVG}}}text" and parent.tag != f"{{{SVG}}}title":
            parent.text = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(attributes: dict[str, str]) -> None:
    """Replace marker colours by variables, remove fonts, and round coordinates."""
    _change(attributes, "style", lambda css: re.sub(r"font-(size|family): [^;]*(; )?", "", css))
    _change(attributes, "style", lambda css: re.sub(r"#fe00(..)", lambda m: f"var(--{VARIABLES[int(m[1], 16)]})", css))
    for name in ("d", "x", "y", "transform"):
        _change(
            attributes, name, lambda text: re.sub(r"\d+\.\d+", lambda m: f"{float(m[0]):.4g}", " ".join(text.split()))
        )


def _change(attributes: dict[str, str], name: str, change: Callable[[str], str]) -> None:
    if name in attributes:
        attributes[name] = change(attributes[name])
