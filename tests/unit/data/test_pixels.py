"""Levels and values are each other's inverse; what lies outside is clipped."""

from __future__ import annotations

import numpy as np

from sdit.data.pixels import from_levels, to_pixels


def test_every_level_survives_the_way_to_the_model_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(2, 2, 8, 8)
    values = from_levels(levels)
    assert values.dtype == np.float32 and (values.min(), values.max()) == (-1, 1)
    assert np.array_equal(to_pixels(values), levels.transpose(0, 2, 3, 1))


def test_values_are_rounded_to_even_and_clipped() -> None:
    images = np.array([-1, 1, -1.5, 1.5, 0], dtype=np.float32).reshape(1, 1, 1, 5)
    assert to_pixels(images).ravel().tolist() == [0, 255, 0, 255, 128]
