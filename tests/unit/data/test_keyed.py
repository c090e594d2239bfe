"""Laws of the keyed draws. Statistical bounds are five standard deviations of the statistic."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sdit.data import keyed
from sdit.data.keyed import Draw

MANY = 20_000


def some_keys(count: int) -> np.ndarray:
    return keyed.keys(0, Draw.FLIP, 0, np.arange(count))


def test_words_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # seed 1234567
    assert keyed.bits(np.array([1234567], np.uint64), 4)[0].tolist() == published


def test_every_word_of_a_key_matters() -> None:
    words = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1)
    keys = np.concatenate([keyed.keys(seed, draw, *words) for seed in range(3) for draw in Draw])
    assert len(np.unique(keys)) == len(keys) == 3 * len(Draw) * 4**4


@pytest.mark.parametrize("draw", [lambda key: keyed.coins(key), lambda key: keyed.normals(key, 7)])
def test_a_draw_does_not_depend_on_its_batch(draw: Callable[[np.ndarray], np.ndarray]) -> None:
    key = some_keys(32)
    alone = np.concatenate([draw(key[i : i + 1]) for i in range(32)])
    assert np.array_equal(draw(key), alone)
    assert np.array_equal(draw(key[::-1]), alone[::-1])


def test_coins_are_fair() -> None:
    assert abs(keyed.coins(some_keys(MANY)).mean() - 0.5) < 5 * 0.5 / np.sqrt(MANY)


def test_permutations_are_permutations_and_equally_likely() -> None:
    seen = Counter(tuple(keyed.permutation(some_keys(6000)[i : i + 1], 3)) for i in range(6000))
    assert set(map(tuple, map(sorted, seen))) == {(0, 1, 2)}
    deviation = np.sqrt(6000 * (1 / 6) * (5 / 6))
    assert len(seen) == 6 and all(abs(count - 1000) < 5 * deviation for count in seen.values())


def test_normals_are_standard_normal_and_independent() -> None:
    draws = keyed.normals(some_keys(MANY // 10), 10).astype(np.float64)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # moments of N(0, 1)
        assert abs((draws**power).mean() - mean) < 5 * np.sqrt(variance / MANY)
    correlation = np.corrcoef(draws.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY // 10)


def test_normals_are_finite_and_float32_for_any_count() -> None:
    for count in (1, 2, 5, 4096):
        draws = keyed.normals(some_keys(3), count)
        assert draws.shape == (3, count) and draws.dtype == np.float32 and np.isfinite(draws).all()
