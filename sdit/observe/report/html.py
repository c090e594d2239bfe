"""HTML by functions: every plain string is escaped, whatever a run's files hold."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

EMPTY_TAGS = {"img", "meta", "br", "rect", "line", "path", "circle", "image", "polyline"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(value: object) -> Html:
    """`value` as HTML; Html stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts, one after another."""
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; `class_` stands for class, underscores for hyphens, attributes that are None are left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in EMPTY_TAGS and not children else f"{opened}{join(children)}</{name}>")


def svg(width: float, height: float, *children: object, label: str) -> Html:
    """A drawing that is as wide as its place; `label` says to those who do not see it what it shows."""
    return tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def shape(name: str, /, **attributes: object) -> Html:
    """An SVG element without content."""
    return Html(tag(name, **attributes)[:-1] + "/>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Html:
    """A table that scrolls by itself when its place is too narrow."""
    heading = tag("thead", tag("tr", *(tag("th", cell) for cell in head))) if head else ""
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", heading, body, class_=class_), class_="scroll")


def card(title: object, *content: object, note: str = "", run: Html | None = None, class_: str = "card") -> Html:
    """A titled box; `run` says whose it is."""
    heading = tag("h3", title, run or "")
    return tag("article", heading, *content, tag("p", note, class_="note") if note else "", class_=class_)


def grid(*cards: object, class_: str = "grid") -> Html:
    """Boxes beside one another, as many as fit."""
    return tag("div", *cards, class_=class_)


def section(name: str, title: str, *content: object) -> Html:
    """A part of the page with a heading that links can name; nothing if it would be empty."""
    if not any(content):
        return Html("")
    return tag("section", tag("h2", title), *content, id=name)
