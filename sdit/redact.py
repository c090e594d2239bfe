"""Removes credentials from text before a run writes it to a file or a log."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL")
SHORTEST_SECRET = 6  # shorter values are flags and numbers, and hiding them would make the text unreadable
HIDDEN = "(hidden)"
_NAME = r"(?:token|key|secret|password|passwd|pwd|passphrase|auth|signature|sig|credential)s?"
# A password may contain / and @, so the text up to the last @ is hidden. Paths lose one / of ://.
_IN_URL = re.compile(r"(?<=:/)(/?)(?:[^\\\s/?#@:'\"]*:[^\s'\"]*@|[^\s/?#@'\"]*@)")
_BEFORE_HOST = re.compile(r"(?<![\w/:.%+-])[\w.%+-]+:[^\s@/:'\"]+@(?=[\w\[])")  # user:password@host without a scheme
_IN_QUERY = re.compile(rf"([?&;#][\w.-]*{_NAME}=)[^\s&;#'\"]+", re.IGNORECASE)
_IN_HEADER = re.compile(r"\b(Bearer|Basic)(\s+)(?=\S*\d)[A-Za-z0-9+/=._~-]{6,}")
_ASSIGNED = re.compile(
    r"\b(\w*(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE)|\w+_KEY)([\"']?\s*=\s*|[\"']\s*:\s*)([\"']?)[^\s,;'\"]+",
    re.IGNORECASE,
)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return `text` without credentials.

    These are the values of secret environment variables, values assigned to secret names (`..._TOKEN=value`), and the user
    information and secret parameters of URLs.
    """
    for name, value in environment.items():
        if len(value) >= SHORTEST_SECRET and any(word in name.upper() for word in SECRET_WORDS):
            text = text.replace(value, HIDDEN)
    return _BEFORE_HOST.sub(f"{HIDDEN}@", _hide_in_urls(_ASSIGNED.sub(rf"\1\2\3{HIDDEN}", text)))


def _hide_in_urls(text: str) -> str:
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    return _IN_HEADER.sub(rf"\1\2{HIDDEN}", _IN_QUERY.sub(rf"\1{HIDDEN}", text))


def holds_credential(text: str) -> bool:
    """Return True if `text` has a URL with user information or a secret parameter, or an authorization header."""
    return _hide_in_urls(text) != text


def is_secret_name(name: str) -> bool:
    """Return True if a variable of this name (`WANDB_API_KEY`, not `MONKEYS`) holds a secret."""
    return any(word.removesuffix("S") in SECRET_WORDS for word in name.upper().split("_"))


def without_credentials(values: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """Return nested `values` without the entries that hold a credential, and the dotted keys of these entries."""
    if not isinstance(values, Mapping):
        return values, []
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in values.items():
        if isinstance(value, str) and holds_credential(value):
            dropped.append(f"{prefix}{key}")
            continue
        kept[key], more = without_credentials(value, f"{prefix}{key}.")
        dropped += more
    return kept, dropped
