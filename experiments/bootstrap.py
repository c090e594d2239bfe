"""Intervals over seeds and held-out images, and the images that a model needs to reach a value.

S seeds, B blocks of held-out images. All arrays of a call have the same seeds and blocks, so that models are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2_000
LEVEL = 0.95
NOT_REACHED = float("inf")
Interval = tuple[float, float]


def interval(arrays: Sequence[np.ndarray], statistic: Callable[..., float]) -> Interval | None:
    """95 % percentile interval of `statistic(*means)`, whose arguments are means over seeds and blocks.

    Each array is (S, B, ...). A resample draws S seeds and B blocks with replacement, the same ones for all arrays. None if
    there is one seed and one block.
    """
    seeds, blocks = arrays[0].shape[:2]
    if seeds == blocks == 1:
        return None
    generator = np.random.default_rng(0)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    by_block = generator.multinomial(blocks, np.full(blocks, 1 / blocks), RESAMPLES) / blocks
    means = [np.einsum("rs,rb,sb...->r...", by_seed, by_block, array, optimize=True) for array in arrays]
    values = [statistic(*(mean[resample] for mean in means)) for resample in range(RESAMPLES)]
    # Infinite values cannot be interpolated, so the quantile is one of the values.
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def images_to_reach(images: Sequence[int], values: Sequence[float] | np.ndarray, target: float) -> float:
    """Images after which a falling curve first has `target` or less, by linear interpolation between its points.

    The first point if it is there already. NOT_REACHED if no point is.
    """
    for number, value in enumerate(values):
        if value <= target:
            if number == 0:
                return float(images[0])
            before, seen = values[number - 1], images[number - 1]
            return float(seen + (images[number] - seen) * (before - target) / (before - value))
    return NOT_REACHED
