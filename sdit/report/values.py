"""Formats numbers as short texts, and extracts curves from the records of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_number(value: object) -> TypeGuard[float]:
    """Return True if `value` is a finite int or float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: float) -> str:
    """Return a number with at most four digits, such as `12.8k`, `0.0123`, `2.5e-4`."""
    size = abs(value)
    for unit, letter in UNITS:
        if size >= unit * 0.9995:
            return f"{value / unit:.4g}{letter}"
    if size and size < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def size(count_bytes: float) -> str:
    """Return bytes as a short text, such as `1.2 MB`."""
    for unit, letter in UNITS:
        if count_bytes >= unit:
            return f"{count_bytes / unit:.3g} {letter}B"
    return f"{count_bytes:.0f} B"


def seconds(value: float) -> str:
    """Return seconds as a short text, such as `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if value < 100:
        return f"{value:.3g} s"
    if value < 6000:
        return f"{int(value) // 60} min {int(value) % 60:02} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02} min"


def mean(values: Sequence[object]) -> float | None:
    """Return the mean of the finite numbers among `values`, or None if there are none."""
    numbers = [float(value) for value in values if is_number(value)]
    return sum(numbers) / len(numbers) if numbers else None


def curve(records: Iterable[Mapping[str, Any]], key: str, index: int | None = None) -> tuple[list[float], list[float]]:
    """Return images seen and the finite values of a key (`outer.inner` if nested), in order.

    If `index` is given, the value is that element of a list.
    """
    outer, _, inner = key.partition(".")
    xs, ys = [], []
    for record in records:
        value, images = record.get(outer), record.get("images_seen")
        if inner:
            value = value.get(inner) if isinstance(value, Mapping) else None
        if index is not None:
            value = value[index] if isinstance(value, list) and index < len(value) else None
        if is_number(value) and is_number(images):
            xs.append(float(images))
            ys.append(float(value))
    return xs, ys
