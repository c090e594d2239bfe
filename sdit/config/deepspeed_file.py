"""Reads the file of a DeepSpeed JSON, with limits, and without credentials."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sdit.errors import ConfigError
from sdit.redact import holds_credential, redact
from sdit.textfile import read_text, text_problem

MAX_DEPTH = 16
MAX_DIGITS = 20  # of an integer, enough for 64 bits
MAX_TEXT = 80


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises: ConfigError: if the file is unreadable, or holds duplicate keys, deep nesting, infinite or huge numbers, or a
        credential.
    """
    text = read_text(path)
    try:
        values = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_bounded
        )
        _check(values, 0)
    except RecursionError:
        raise ConfigError(f"{path}: is not valid JSON: it is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:MAX_DIGITS]} is not finite")
    return value


def _bounded(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _check(value: Any, depth: int) -> None:
    """Refuse deep nesting, control characters and credentials.

    Raises: ValueError: if `value` holds one of them.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        if problem := text_problem(value):
            raise ValueError(f"a text {problem}")
        if holds_credential(value):
            raise ValueError("a text holds a credential, and the JSON is written to the run's files")
    for item in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(item, depth + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {redact(key[:MAX_TEXT])!r} is given twice")
        values[key] = value
    return values
