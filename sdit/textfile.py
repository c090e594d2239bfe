"""Reads small text files of users. Type and size are limited, so that no file can block a launcher or exhaust its memory."""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path

from sdit.errors import ConfigError

MAX_BYTES = 1 << 16
LINE_BREAKS = ("Zl", "Zp")  # Unicode line and paragraph separators
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path) -> str:
    """Return the UTF-8 text of a regular file of at most `MAX_BYTES` bytes, without a byte order mark.

    Raises: ConfigError: if the file is missing, not regular (folder, pipe, device), too large, or not UTF-8 text.
    """
    try:
        content = _read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; is it a config?")
    if content.startswith(UTF_16):
        raise ConfigError(f"{path}: is UTF-16 text; legal: the same text saved as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; is it a config?") from None


def _read_regular(path: str | Path) -> bytes:
    # O_NONBLOCK: do not wait for the writer of a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"{path}: is {kind}; legal: a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)


def text_problem(text: str) -> str:
    """Return the reason why `text` cannot be in a config or a path, or an empty string."""
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            return "is not UTF-8 text"
        if category == "Cc" or category in LINE_BREAKS:
            return f"holds the control character {character!r}"
    return ""
