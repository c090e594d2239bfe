"""Charts as inline SVG. Colours are names of the style sheet's variables, so that light and dark need no second drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

from sdit.observe.report.html import Html, escape, join, shape, svg, tag
from sdit.observe.report.numbers import log_ticks, short, smooth, thin, ticks

WIDTH, HEIGHT = 420.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 12.0, 12.0, 44.0
PLAIN_POINTS = 40  # curves of more points are noisy: they get a smooth line on top of a faint one
IMAGES = "images seen"
SMOOTH_SHARE = 1 / 60


@dataclass(frozen=True)
class Series:
    """A curve; `colour` names a variable of the style sheet, such as c0 or s3."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dashed: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Mark:
    """A moment worth a vertical line, such as a restart."""

    x: float
    text: str
    colour: str = "bad"


class Axes:
    """Maps values to the drawing, linearly or by logarithm, and draws ticks and grid."""

    def __init__(
        self, x_range: tuple[float, float], y_range: tuple[float, float], log_y: bool, height: float = HEIGHT
    ) -> None:
        self._log, self.height = log_y, height
        self._x0, self._x1 = x_range if x_range[1] > x_range[0] else (x_range[0] - 0.5, x_range[0] + 0.5)
        self._low, self._high = y_range
        low, high = (log10(self._low), log10(self._high)) if log_y else y_range
        self._y0, self._y1 = (low, high) if high > low else (low - 0.5, high + 0.5)

    def x(self, value: float) -> float:
        return LEFT + (value - self._x0) / (self._x1 - self._x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        place = log10(max(value, 1e-300)) if self._log else value
        inside = min(1.0, max(0.0, (place - self._y0) / (self._y1 - self._y0)))
        return self.height - BOTTOM - inside * (self.height - TOP - BOTTOM)

    def draw(self, x_label: str, y_label: str, tick: Callable[[float], str] = short) -> Html:
        """Grid, ticks and the names of the axes."""
        parts: list[Html] = []
        values = log_ticks(self._low, self._high) if self._log else ticks(self._y0, self._y1, 5)
        for value in values:
            y = self.y(value)
            parts.append(shape("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid-line"))
            parts.append(tag("text", tick(value), x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
        bottom = self.height - BOTTOM
        for value in ticks(self._x0, self._x1, 4):
            x = self.x(value)
            parts.append(shape("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=bottom, y2=bottom + 4, class_="axis"))
            anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
            parts.append(tag("text", short(value), x=f"{x:.1f}", y=bottom + 17, text_anchor=anchor))
        parts.append(shape("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(tag("text", x_label, x=middle, y=self.height - 6, text_anchor="middle", class_="label"))
        turn = f"rotate(-90 11 {(TOP + bottom) / 2:g})"
        parts.append(
            tag("text", y_label, x=11, y=(TOP + bottom) / 2, transform=turn, text_anchor="middle", class_="label")
        )
        return join(parts)


def line_chart(
    series: Sequence[Series], y_label: str, x_label: str = IMAGES, log_y: bool = False, from_zero: bool = False,
    marks: Sequence[Mark] = (), top: float | None = None,
) -> Html:  # fmt: skip
    """Curves over one another with a legend; a line of words if there is nothing to draw."""
    shown = [one for one in (_positive(one) if log_y else one for one in series) if len(one.xs)]
    if not shown:
        return tag("p", "no values", class_="empty")
    xs = [x for one in shown for x in one.xs]
    first = 0.0 if x_label == IMAGES else min(xs)
    axes = Axes((first, max(xs)), _range(shown, log_y, from_zero, top), log_y)
    lines = [_mark(axes, mark) for mark in marks if first <= mark.x <= max(xs)]
    lines += [_line(axes, one) for one in shown]
    label = f"{y_label} over {x_label}: {', '.join(one.label for one in shown)}"
    drawing = svg(WIDTH, HEIGHT, axes.draw(x_label, y_label), *lines, label=label)
    named = [(one.label, one.colour) for one in shown] if len(shown) > 1 else []
    colours = {mark.text.split(":")[0]: mark.colour for mark in marks}
    return join([drawing, legend(named + list(colours.items()))])


def legend(items: Sequence[tuple[str, str]]) -> Html:
    """Coloured names; nothing for none."""
    if not items:
        return Html("")
    return tag(
        "ul",
        *(tag("li", tag("i", style=f"background:var(--{colour})"), text) for text, colour in items),
        class_="legend",
    )


def _positive(one: Series) -> Series:
    pairs = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y > 0]
    return Series(one.label, [x for x, _ in pairs], [y for _, y in pairs], one.colour, one.dashed, one.plain)


def _range(series: Sequence[Series], log_y: bool, from_zero: bool, top: float | None) -> tuple[float, float]:
    """What the vertical axis shows: nearly everything; of long curves a few wild values at either end may be cut off."""
    low, high = [], []
    for one in series:
        ys = sorted(one.ys)
        cut = len(ys) // 100 if log_y else len(ys) // 50
        low.append(ys[0])
        high.append(ys[-1 - cut])
    bottom, peak = min(low), top if top is not None else max(high)
    if log_y:
        return bottom * 0.9, max(peak, bottom) * 1.1
    if from_zero:
        return min(0.0, bottom), peak * 1.06 or 1.0
    margin = 0.05 * (peak - bottom) or abs(peak) * 0.1 or 1.0
    return bottom - margin, peak + margin


def _line(axes: Axes, one: Series) -> Html:
    style = f"stroke:var(--{one.colour})"
    dash = "5 4" if one.dashed else None
    xs, ys = thin(one.xs, one.ys)
    if len(xs) == 1:
        return shape(
            "circle", cx=f"{axes.x(xs[0]):.1f}", cy=f"{axes.y(ys[0]):.1f}", r=3, style=f"fill:var(--{one.colour})"
        )
    if one.plain or len(one.xs) <= PLAIN_POINTS:
        return shape("polyline", points=_points(axes, xs, ys), class_="curve", style=style, stroke_dasharray=dash)
    smooth_x, smooth_y = thin(one.xs, smooth(one.ys, len(one.ys) * SMOOTH_SHARE))
    faint = shape("polyline", points=_points(axes, xs, ys), class_="curve faint", style=style)
    points = _points(axes, smooth_x, smooth_y)
    return join([faint, shape("polyline", points=points, class_="curve", style=style, stroke_dasharray=dash)])


def _points(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _mark(axes: Axes, mark: Mark) -> Html:
    x = f"{axes.x(mark.x):.1f}"
    line = shape(
        "line", x1=x, x2=x, y1=TOP, y2=axes.height - BOTTOM, class_="mark", style=f"stroke:var(--{mark.colour})"
    )
    return tag("g", tag("title", mark.text), line)


def split_bar(parts: Sequence[tuple[str, float, str]], unit: Callable[[float], str]) -> Html:
    """One bar cut into (name, amount, colour), with a table of amounts and shares."""
    total = sum(amount for _, amount, _ in parts)
    if total <= 0:
        return tag("p", "no values", class_="empty")
    pieces, rows = [], []
    for name, amount, colour in parts:
        share = amount / total
        style = f"width:{100 * share:.3f}%;background:var(--{colour})"
        pieces.append(tag("span", style=style, title=f"{name}: {unit(amount)}, {share:.1%}"))
        key = join([tag("i", style=f"background:var(--{colour})"), escape(name)])
        rows.append(tag("tr", tag("td", key), tag("td", unit(amount)), tag("td", f"{share:.1%}")))
    return join([tag("div", *pieces, class_="bar"), tag("table", tag("tbody", *rows), class_="split")])


def picture_chart(
    uri: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str,
    scale: tuple[str, str, str] | None = None, label: str = "",
) -> Html:  # fmt: skip
    """A picture with axes; tick places are shares of its width and height, from the upper left corner.

    `scale`: what the colour bar runs from and to, and the gradient that it shows.
    """
    height = HEIGHT + 30
    width, tall = WIDTH - LEFT - RIGHT, height - TOP - BOTTOM
    parts = [
        shape("image", href=uri, x=LEFT, y=TOP, width=width, height=tall, preserveAspectRatio="none", class_="pixels"),
        shape("rect", x=LEFT, y=TOP, width=width, height=tall, class_="frame"),
    ]
    for place, text in x_ticks:
        x = LEFT + place * width
        anchor = "end" if place > 0.97 else "middle"
        parts.append(tag("text", text, x=f"{x:.1f}", y=height - BOTTOM + 16, text_anchor=anchor))
    for place, text in y_ticks:
        parts.append(tag("text", text, x=LEFT - 6, y=f"{TOP + place * tall + 4:.1f}", text_anchor="end"))
    parts.append(tag("text", x_label, x=LEFT + width / 2, y=height - 6, text_anchor="middle", class_="label"))
    turn = f"rotate(-90 11 {TOP + tall / 2:g})"
    parts.append(tag("text", y_label, x=11, y=TOP + tall / 2, transform=turn, text_anchor="middle", class_="label"))
    drawing = svg(WIDTH, height, *parts, label=label or f"{y_label} against {x_label}")
    if scale is None:
        return drawing
    low, high, gradient = scale
    return join([drawing, tag("div", low, tag("b", style=f"background:{gradient}"), high, class_="scale")])
