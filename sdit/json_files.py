"""Small JSON files that processes leave for one another; a reader sees the old or the new text, never a torn one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdit.files import replacing_path


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Replace the file in one step. Several processes may do so. Raises: OSError."""
    with replacing_path(path, shared=True) as partial:
        partial.write_text(json.dumps(body) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is none (yet) or it is no JSON object."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
