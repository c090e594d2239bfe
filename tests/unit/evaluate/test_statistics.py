"""Statistics of a stream: those of the whole, however it was cut, in memory that does not grow."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from sdit.errors import ConfigError, DataError
from sdit.evaluate.features import rebatched
from sdit.evaluate.statistics import Moments, Reservoir, statistics_of


class Averages:
    """Features are means over rows of pixels, logits over columns."""

    digest = "averages"
    facts: dict[str, Any] = {}  # noqa: RUF012

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 6:
            raise ConfigError("6 rows")

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = images[..., 0].astype(np.float32)
        return wide.mean(axis=2), wide.mean(axis=1)


def pictures(count: int, height: int = 6) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, 5, 1), dtype=np.uint8)


@pytest.mark.parametrize("cut", [1, 7, 1300])
def test_statistics_do_not_depend_on_how_the_stream_is_cut(cut: int) -> None:
    images = pictures(1300)
    parts = (images[start : start + cut] for start in range(0, len(images), cut))
    found = statistics_of(parts, Averages())
    features, logits = Averages()(images)
    wide = features.astype(np.float64)
    assert found.count == 1300
    assert found.mean == pytest.approx(wide.mean(axis=0), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(wide, rowvar=False), rel=1e-10)
    assert np.array_equal(found.features, features) and np.array_equal(found.logits, logits)
    assert found.images == statistics_of([images], Averages()).images
    assert found.images != statistics_of([images[::-1]], Averages()).images


def test_moments_do_not_cancel() -> None:
    rows = np.random.default_rng(0).normal(1e6, 1e-3, size=(1000, 3))
    moments = Moments()
    for part in np.array_split(rows, 13):
        moments.add(part)
    mean, covariance = moments.result()
    assert covariance == pytest.approx(np.cov(rows - 1e6, rowvar=False), rel=1e-6)
    assert mean == pytest.approx(rows.mean(axis=0), rel=1e-14)


@pytest.mark.parametrize("cut", [1, 13, 1000])
def test_kept_rows_are_an_even_choice_that_the_cut_does_not_change(cut: int) -> None:
    rows = np.arange(4000)[:, None]
    kept = Reservoir(200)
    for start in range(0, len(rows), cut):
        kept.add(rows[start : start + cut])
    whole = Reservoir(200)
    whole.add(rows)
    assert np.array_equal(kept.rows, whole.rows)
    chosen = kept.rows[:, 0]
    assert len(chosen) == 200 and (np.diff(chosen) > 0).all()
    assert abs(chosen.mean() - 2000) < 4 * 4000 / 12**0.5 / 200**0.5
    # Labels of drawn images go round: every class must stay, in its share.
    assert np.bincount(chosen % 10, minlength=10).min() >= 8


def test_a_short_stream_is_kept_whole() -> None:
    kept = Reservoir(200)
    kept.add(np.arange(150)[:, None])
    assert len(kept.rows) == 150


def test_memory_does_not_grow_with_the_stream() -> None:
    def peak_bytes(images: int) -> int:
        tracemalloc.start()
        kept, moments = Reservoir(1000), Moments()
        generator = np.random.default_rng(0)
        for _ in range(images // 500):
            rows = generator.random((500, 64), dtype=np.float32)
            kept.add(rows)
            moments.add(rows)
        assert len(kept.rows) <= 1000 and moments.count == images
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(500)  # what numpy allocates once
    assert peak_bytes(50_000) < 1.05 * peak_bytes(5_000)


def test_rebatched_keeps_order_and_count() -> None:
    images = pictures(23)
    batches = list(rebatched(iter([images[:1], images[1:15], images[15:]]), 5))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(batches), images)


def test_what_are_no_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="float64 of shape"):
        statistics_of([np.zeros((2, 6, 5, 1))], Averages())
    with pytest.raises(ConfigError, match="6 rows"):
        statistics_of([pictures(3, height=4)], Averages())
    for few in ([], [pictures(1)]):
        with pytest.raises(DataError, match="legal: 2 or more"):
            statistics_of(few, Averages())
