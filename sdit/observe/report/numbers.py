"""Numbers for people and axes: short forms, round ticks, and curves of a few hundred points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
MAX_POINTS = 240


def is_number(value: object) -> bool:
    """A finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> str:
    """`12.8k`, `0.0123`, `4e-05`: at most four digits."""
    size = abs(value)
    for unit, letter in UNITS:
        if size >= unit * 0.9995:
            return f"{value / unit:.4g}{letter}"
    if size and size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def size(count_bytes: float) -> str:
    """`1.2 MB`."""
    for unit, letter in UNITS:
        if count_bytes >= unit:
            return f"{count_bytes / unit:.3g} {letter}B"
    return f"{count_bytes:.0f} B"


def seconds(value: float) -> str:
    """`12 s`, `3 min 20 s`, `2 h 05 min`."""
    if value < 100:
        return f"{value:.3g} s"
    if value < 6000:
        return f"{int(value) // 60} min {int(value) % 60:02} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02} min"


def rough(value: float) -> str:
    """Seconds in one unit: `47.1 s`, `4.8 min`, `2.1 h`."""
    for unit, name in ((3600, "h"), (60, "min")):
        if value >= 1.5 * unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} s"


def curve(records: Iterable[Mapping[str, Any]], key: str, part: int | None = None) -> tuple[list[float], list[float]]:
    """Images seen and the finite values of a key (or of one `part` of its list), in order."""
    xs, ys = [], []
    for record in records:
        value, images = record.get(key), record.get("images_seen")
        if part is not None:
            value = value[part] if isinstance(value, list) and part < len(value) else None
        if is_number(value) and is_number(images):
            xs.append(float(images))  # type: ignore[arg-type]
            ys.append(float(value))  # type: ignore[arg-type]
    return xs, ys


def thin(xs: Sequence[float], ys: Sequence[float], points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `points` points: means of neighbours; the last point stays as it is."""
    if len(xs) <= points:
        return list(xs), list(ys)
    edges = [round(place * (len(xs) - 1) / (points - 1)) for place in range(points)]
    groups = list(pairwise(edges))
    thin_x = [sum(xs[low:high]) / (high - low) for low, high in groups]
    thin_y = [sum(ys[low:high]) / (high - low) for low, high in groups]
    return [*thin_x, xs[-1]], [*thin_y, ys[-1]]


def smooth(ys: Sequence[float], memory: float) -> list[float]:
    """Exponential mean over about `memory` points, without a bias at the start."""
    rate, total, weight, out = 1 / max(1.0, memory), 0.0, 0.0, []
    for y in ys:
        total += rate * (y - total)
        weight += rate * (1 - weight)
        out.append(total / weight)
    return out


def ticks(low: float, high: float, number: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `number` of them."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / number))
    step = min((step * factor for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs((high - low) / size - number))
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between positive `low` and `high`, with 2 and 5 when there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            return found
    return found if len(found) > 1 else ticks(low, high, 4)
