"""Are drawn digits digits, of the right class, and as different from one another as real ones?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.data.digits import digits

WANTED_RECOGNISED = 0.97  # the classifier itself recognises 0.989 of the real digits it has not seen
# Measured on the real digits, whose spread is 1: with labels ignored it is 1.39; only one k-means style of each class
# has 0.76 if there are 4 styles, 0.64 of 10, 0.56 of 20. Twenty digits of each class have 0.97 +- 0.02.
SPREAD_BAND = (0.6, 1.39)


@dataclass(frozen=True)
class DigitsReport:
    """Shares of samples (`recognised`) and of unseen real digits (`held_out`) given their label; relative `spread`."""

    recognised: float
    held_out: float
    spread: float

    @property
    def good(self) -> bool:
        return self.recognised >= WANTED_RECOGNISED and SPREAD_BAND[0] <= self.spread <= SPREAD_BAND[1]


def judge_digits(images: np.ndarray, labels: np.ndarray) -> DigitsReport:
    """Hold samples (n, 1, 8, 8) in [-1, 1] with labels (n,) against the real digits, of which half train an SVC."""
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # slow to import
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    pixels, truth = digits()
    real = pixels.reshape(len(pixels), -1) / 127.5 - 1
    seen, unseen, seen_truth, unseen_truth = train_test_split(
        real, truth, test_size=0.5, stratify=truth, random_state=0
    )
    classifier = SVC(kernel="rbf", C=10).fit(seen, seen_truth)
    drawn = images.reshape(len(images), -1)
    return DigitsReport(
        recognised=float((classifier.predict(drawn) == labels).mean()),
        held_out=float((classifier.predict(unseen) == unseen_truth).mean()),
        spread=within_class_spread(drawn, labels) / within_class_spread(real, truth),
    )


def within_class_spread(rows: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes and pixels of the standard deviation of a pixel among the rows (n, pixels) of a class."""
    deviations = [rows[labels == label].std(axis=0, ddof=1) for label in np.unique(labels)]
    return float(np.mean(deviations))
