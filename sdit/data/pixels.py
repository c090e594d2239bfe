"""Conversion between pixel levels 0..255 and the values [-1, 1] that a model sees."""

from __future__ import annotations

import numpy as np

ROUNDING = "round half to even of (x + 1) * 127.5, clipped to 0..255"


def from_levels(levels: np.ndarray) -> np.ndarray:
    """Return float32 values in [-1, 1] of uint8 levels of any shape."""
    values: np.ndarray = levels / np.float32(127.5) - np.float32(1)
    return values


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Return pixels (n, H, W, C) uint8 of images (n, C, H, W) in [-1, 1], rounded by ROUNDING."""
    return np.clip(np.round((images.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255).astype(np.uint8)
