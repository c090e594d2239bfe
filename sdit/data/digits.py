"""The 1,797 handwritten digits of scikit-learn: 8 x 8 grey pixels with values 0..16."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sdit.data.index import DatasetFacts

DIGITS_FACTS = DatasetFacts(
    kind="images", total=1797, channels=1, size=8, classes=10, class_names=tuple("0123456789"), mirrored=False
)


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return read-only images (1797, 1, 8, 8) uint8 and labels (1797,) int64. Values 0..16 are stretched to 0..255."""
    sklearn = find_spec("sklearn")  # only its folder: importing `load_digits` takes a second of every rank
    assert sklearn is not None and sklearn.origin is not None
    rows = np.loadtxt(Path(sklearn.origin).with_name("datasets") / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.round(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    pixels.flags.writeable = labels.flags.writeable = False
    return pixels, labels
