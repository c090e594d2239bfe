"""The checkout of the repository that this code runs from, if it does."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """Return the root folder of the checkout; None if this code runs from an installed wheel."""
    return ROOT if (ROOT / "launcher" / "train.py").is_file() else None
