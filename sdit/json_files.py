"""Small JSON files that processes exchange. They are written atomically, so a reader never sees an incomplete file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdit.files import replacing_path


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Replace the file atomically. Several processes may do so at the same time.

    Raises: OSError: if it cannot be written.
    """
    with replacing_path(path, shared=True) as partial:
        partial.write_text(json.dumps(body) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None if the file does not exist or is not a JSON object."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
