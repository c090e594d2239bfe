"""Names of files and classes: how they are stored, and how they appear in messages."""

from __future__ import annotations

import os


def stored_name(name: str) -> str:
    """Return a file system name as UTF-8 text. Bytes that are not UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shown(name: object) -> str:
    """Return a name or path for a one-line message. Control characters, line breaks and non-UTF-8 bytes are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in stored_name(str(name))
    )
