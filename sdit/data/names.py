"""Names of files and classes: how they are stored, and how they are shown in one line."""

from __future__ import annotations

import os


def stored_name(name: str) -> str:
    """A file system name as UTF-8 text; bytes that are not UTF-8 become escapes such as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shown(name: object) -> str:
    """A name or path for a message; line breaks, control characters and bytes that are not UTF-8 are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in stored_name(str(name))
    )
