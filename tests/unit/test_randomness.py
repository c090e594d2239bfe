"""Laws of the counter-based generators. Statistical bounds are five standard deviations of the statistic."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from sdit import randomness
from sdit.randomness import Purpose

MANY = 20_000
SPLITMIX = [purpose for purpose in Purpose if purpose.value[0] == "splitmix"]


def some_keys(count: int) -> np.ndarray:
    return randomness.keys(0, Purpose.FLIP, 0, np.arange(count))


def test_words_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # seed 1234567
    assert randomness.bits(np.array([1234567], np.uint64), 4)[0].tolist() == published


def test_every_word_of_a_key_matters() -> None:
    words = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1)
    keys = np.concatenate([randomness.keys(seed, draw, *words) for seed in range(3) for draw in SPLITMIX])
    assert len(np.unique(keys)) == len(keys) == 3 * len(SPLITMIX) * 4**4


@pytest.mark.parametrize("draw", [lambda key: randomness.coins(key), lambda key: randomness.normals(key, 7)])
def test_a_draw_does_not_depend_on_its_batch(draw: Callable[[np.ndarray], np.ndarray]) -> None:
    key = some_keys(32)
    alone = np.concatenate([draw(key[i : i + 1]) for i in range(32)])
    assert np.array_equal(draw(key), alone)
    assert np.array_equal(draw(key[::-1]), alone[::-1])


def test_coins_are_fair() -> None:
    assert abs(randomness.coins(some_keys(MANY)).mean() - 0.5) < 5 * 0.5 / np.sqrt(MANY)


def test_permutations_are_permutations_and_equally_likely() -> None:
    seen = Counter(tuple(randomness.permutation(some_keys(6000)[i : i + 1], 3)) for i in range(6000))
    assert set(map(tuple, map(sorted, seen))) == {(0, 1, 2)}
    deviation = np.sqrt(6000 * (1 / 6) * (5 / 6))
    assert len(seen) == 6 and all(abs(count - 1000) < 5 * deviation for count in seen.values())


def test_normals_are_standard_normal_and_independent() -> None:
    draws = randomness.normals(some_keys(MANY // 10), 10).astype(np.float64)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # moments of N(0, 1)
        assert abs((draws**power).mean() - mean) < 5 * np.sqrt(variance / MANY)
    correlation = np.corrcoef(draws.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY // 10)


def test_normals_are_finite_and_float32_for_any_count() -> None:
    for count in (1, 2, 5, 4096):
        draws = randomness.normals(some_keys(3), count)
        assert draws.shape == (3, count) and draws.dtype == np.float32 and np.isfinite(draws).all()


def test_noise_is_that_of_a_new_generator_for_each_sample() -> None:
    indices = np.array([0, 1, 5, 5, 2**40, 2**63 - 1])
    noise = randomness.normal_noise(2**64 - 1, indices, (3, 5), Purpose.NOISE, step=7)
    key = np.array([2**64 - 1, 3], np.uint64)
    for row, index in zip(noise, indices, strict=True):
        philox = np.random.Philox(key=key, counter=np.array([0, 7, index, 0], np.uint64))
        plain = np.random.Generator(philox).standard_normal((3, 5), dtype=np.float32)
        assert row.tobytes() == plain.tobytes()


def test_bits_of_every_purpose_are_those_of_the_first_version() -> None:
    """A run that an older version began continues with the same numbers."""
    index, word = np.array([0, 5, 2**40]), np.array([1, 2, 3])
    first_keys = [int(randomness.keys(7, purpose, index, word)[1]) for purpose in SPLITMIX]
    assert first_keys == [
        15919049796538928004, 11172615078978282590, 15446808585912365581, 8377465523642076185, 12451018580087597005,
    ]  # fmt: skip
    philox = [purpose for purpose in Purpose if purpose not in SPLITMIX]
    assert [randomness.uniform(7, index, purpose)[2] for purpose in philox] == [
        0.908203101092125, 0.5267148136973028, 0.9795129334161057, 0.3015746174864315, 0.5415868854020722, 0.5923803113168351,
    ]  # fmt: skip
    assert [float(randomness.normal_noise(7, index, (2,), purpose, 3)[2, 1]) for purpose in philox] == [
        0.2764050364494324, 0.742843508720398, -2.2728540897369385, -1.861372709274292, -0.9319677948951721,
        0.8569296598434448,
    ]  # fmt: skip
    assert randomness.priorities(7, index, word).tolist() == [
        4414019431610648415, 10842689389309339473, 4677485402615078255,
    ]  # fmt: skip
    assert randomness.named_seed(7, "blocks.0.w") == 7474808127457186537
    assert randomness.named_seed(7, "blocks.0.w", 2) == 18192520859033347430
