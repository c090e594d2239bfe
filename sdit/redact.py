"""Secrets stay out of what a run writes down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
SHORTEST_SECRET = 6  # shorter values of such variables are flags and numbers; hiding them would garble the text
HIDDEN = "(hidden)"
_ASSIGNED = re.compile(r"\b(\w*(?:TOKEN|API_?KEY|SECRET|PASSWORD)|\w+_KEY)(\s*=\s*)([^\s,;'\"]+)", re.IGNORECASE)
_IN_URL = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of secret environment variables, without `..._TOKEN=value`, and without passwords in URLs."""
    for name, value in environment.items():
        if len(value) >= SHORTEST_SECRET and any(word in name.upper() for word in SECRET_WORDS):
            text = text.replace(value, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}@", _ASSIGNED.sub(rf"\1\2{HIDDEN}", text))
