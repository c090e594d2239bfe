"""The cache folders of this process and of the libraries that it uses."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def use_cache(fallbacks: Sequence[Path]) -> Path | None:
    """Return the user's cache folder, or the first of `fallbacks` that is writable. Return None if there is none.

    A fallback is also set in the environment. Without a home folder, matplotlib, W&B and other libraries fail or warn, and a
    user unknown to a container has no home folder. Processes that are started later inherit the environment.
    """
    user = user_cache()
    folder = next((each for each in (*([user] if user else []), *fallbacks) if can_write(each)), None)
    if folder is None:
        return None
    if folder != user:
        folder = folder.resolve()
        os.environ["XDG_CACHE_HOME"] = str(folder)
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    if _home() is None:
        os.environ["HOME"] = str(folder)
    return folder


def run_caches(path: Path) -> list[Path]:
    """Return the fallback in a run folder, or an empty list if the path is not a run folder."""
    return [path / "cache"] if (path / "checkpoints").is_dir() else []


def user_cache() -> Path | None:
    """Return $XDG_CACHE_HOME, or .cache in the home folder. Return None if the user has no home folder."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    home = _home()
    return None if home is None else home / ".cache"


def can_write(folder: Path) -> bool:
    """Create the folder and return True if a file can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _home() -> Path | None:
    if os.environ.get("HOME") == "":
        return None
    try:
        return Path.home()
    except RuntimeError:  # $HOME is not set, and the user is not in the list of users
        return None
