"""Numbers as short texts, and curves from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_number(value: object) -> bool:
    """Return whether `value` is a finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> str:
    """Return `12.8k`, `0.0123`, `2.5e-4`: at most four digits."""
    size = abs(value)
    for unit, letter in UNITS:
        if size >= unit * 0.9995:
            return f"{value / unit:.4g}{letter}"
    if size and size < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def size(count_bytes: float) -> str:
    """Return `1.2 MB`."""
    for unit, letter in UNITS:
        if count_bytes >= unit:
            return f"{count_bytes / unit:.3g} {letter}B"
    return f"{count_bytes:.0f} B"


def seconds(value: float) -> str:
    """Return `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if value < 100:
        return f"{value:.3g} s"
    if value < 6000:
        return f"{int(value) // 60} min {int(value) % 60:02} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02} min"


def mean(values: Sequence[object]) -> float | None:
    """Return the mean of the finite numbers among `values`; None if there are none."""
    numbers = [float(value) for value in values if is_number(value)]  # type: ignore[arg-type]
    return sum(numbers) / len(numbers) if numbers else None


def curve(records: Iterable[Mapping[str, Any]], key: str, part: int | None = None) -> tuple[list[float], list[float]]:
    """Return images seen and the finite values of a key (`outer.inner`: nested), or of one `part` of its list, in order."""
    outer, _, inner = key.partition(".")
    xs, ys = [], []
    for record in records:
        value, images = record.get(outer), record.get("images_seen")
        if inner:
            value = value.get(inner) if isinstance(value, Mapping) else None
        if part is not None:
            value = value[part] if isinstance(value, list) and part < len(value) else None
        if is_number(value) and is_number(images):
            xs.append(float(images))  # type: ignore[arg-type]
            ys.append(float(value))  # type: ignore[arg-type]
    return xs, ys
