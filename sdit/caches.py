"""Where this process and the libraries that it uses keep caches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def use_cache(fallbacks: Sequence[Path]) -> Path | None:
    """The user's cache folder, or the first of `fallbacks` that can be written; None if there is none.

    A fallback is put into the environment: matplotlib, W&B and others fail or warn without a home folder, which a
    container with an unknown user does not have. Processes that are started later inherit it.
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
    """The fallback inside a run's folder; none if the path is something else."""
    return [path / "cache"] if (path / "checkpoints").is_dir() else []


def user_cache() -> Path | None:
    """$XDG_CACHE_HOME, or .cache in the home folder; None if the user has no home folder."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen)
    home = _home()
    return None if home is None else home / ".cache"


def can_write(folder: Path) -> bool:
    """Whether a file can be made in the folder, which is created."""
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
