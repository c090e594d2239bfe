"""The 1,797 handwritten digits of scikit-learn: 8 x 8 grey pixels with values 0..16."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sdit.data.index import DatasetFacts

DIGITS_FACTS = DatasetFacts(
    kind="images", total=1797, channels=1, size=8, classes=10, class_names=tuple("0123456789"), mirrored=False
)


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return read-only images (1797, 1, 8, 8) uint8 and labels (1797,) int64. Values 0..16 are stretched to 0..255."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import, rarely needed

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    pixels.flags.writeable = labels.flags.writeable = False
    return pixels, labels
