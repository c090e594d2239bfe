"""Draws are pure functions of seed and sample index, with the distributions they promise."""

import math

import numpy as np
import pytest
import torch

from sdit.diffusion.draws import draw_label_drop
from sdit.diffusion.losses import UncertaintyWeight
from sdit.randomness import Purpose, normal_noise, philox, uniform
from sdit.time_law import TimeLaw

SIGMAS = 5.0  # a correct draw is further out than this with probability 6e-7


def assert_uniform_counts(counts, total, shares=None):
    """Pearson's chi-square of `counts` is within SIGMAS of its mean k - 1 (variance 2 (k - 1))."""
    counts = np.asarray(counts, float)
    expected = total / len(counts) if shares is None else total * np.asarray(shares)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert abs(chi_square - freedom) < SIGMAS * math.sqrt(2 * freedom)


def draw_timesteps(seed, first_index, global_batch, timesteps, mode="uniform", clusters=8):
    law = TimeLaw("stratified", clusters=clusters) if mode == "uw" else TimeLaw(mode)
    return law.draw(seed, first_index, global_batch, timesteps)


def words(*values):
    return tuple(np.array([value], np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_authors_known_answers(counter, key, output):
    assert philox(words(*counter), key) == words(*output)


def test_uniform_is_uniform_in_the_open_interval():
    draws = uniform(7, np.arange(100_000), Purpose.TIMESTEP)
    assert draws.dtype == np.float64 and draws.min() > 0 and draws.max() < 1
    assert_uniform_counts(np.histogram(draws, bins=200, range=(0, 1))[0], len(draws))


def correlation(a, b):
    return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_seeds_streams_and_neighbours_are_independent():
    index = np.arange(50_000)
    base = uniform(3, index, Purpose.TIMESTEP)
    others = [
        uniform(4, index, Purpose.TIMESTEP),
        uniform(3, index, Purpose.STRATUM),
        uniform(3, index + 1, Purpose.TIMESTEP),
    ]
    others += [uniform(3 + 2**32, index, Purpose.TIMESTEP), uniform(3, index + 2**32, Purpose.TIMESTEP)]
    for other in others:
        assert correlation(base, other) < SIGMAS / math.sqrt(len(index))


def test_uniform_is_independent_of_batching_and_order():
    index = np.array([5, 2**40, 0, 17, 2**63 - 1])
    together = uniform(11, index, Purpose.LABEL_DROP)
    alone = np.concatenate([uniform(11, [int(i)], Purpose.LABEL_DROP) for i in index])
    assert np.array_equal(together, alone)
    assert np.array_equal(uniform(11, index[::-1], Purpose.LABEL_DROP), together[::-1])


def test_uniform_timesteps_do_not_know_the_batch():
    together = draw_timesteps(0, 100, 64, 1000, "uniform")
    parts = [draw_timesteps(0, 100 + 16 * part, 16, 1000, "uniform") for part in range(4)]
    assert np.array_equal(together, np.concatenate(parts))


@pytest.mark.parametrize("mode", ["uniform", "stratified", "uw"])
@pytest.mark.parametrize("timesteps", [1000, None])
def test_timesteps_are_a_function_of_seed_and_index(mode, timesteps):
    first = draw_timesteps(5, 640, 64, timesteps, mode)
    assert np.array_equal(first, draw_timesteps(5, 640, 64, timesteps, mode))
    assert not np.array_equal(first, draw_timesteps(6, 640, 64, timesteps, mode))
    assert not np.array_equal(first, draw_timesteps(5, 704, 64, timesteps, mode))
    if timesteps is None:
        assert first.dtype == np.float32 and np.all((first > 0) & (first < 1))
    else:
        assert first.dtype == np.int64 and np.all((first >= 0) & (first < timesteps))


@pytest.mark.parametrize(("batch", "timesteps"), [(8, 1000), (256, 1000), (48, 7), (2048, 1000), (1, 10)])
def test_strata_hold_one_timestep_each(batch, timesteps):
    """With one t per equal stratum, the number of t below any tau is within 1 of its expectation."""
    for step in range(5):
        t = draw_timesteps(1, step * batch, batch, timesteps, "stratified")
        below = np.cumsum(np.bincount(t, minlength=timesteps))
        expected = batch * np.arange(1, timesteps + 1) / timesteps
        assert np.all(np.abs(below - expected) < 1 + 1e-9)


@pytest.mark.parametrize("mode", ["uniform", "stratified"])
@pytest.mark.parametrize(("batch", "timesteps"), [(3, 10), (16, 7), (8, 64)])
def test_each_sample_alone_is_uniform_over_all_timesteps(mode, batch, timesteps):
    """Also where the batch divides nothing: one place in the batch, over many steps."""
    steps = 3000
    drawn = np.array([draw_timesteps(2, step * batch, batch, timesteps, mode) for step in range(steps)])
    for place in (0, batch - 1):
        assert_uniform_counts(np.bincount(drawn[:, place], minlength=timesteps), steps)


def test_stratified_timesteps_do_not_follow_the_order_of_samples():
    batch, steps = 16, 2000
    drawn = np.array([draw_timesteps(3, step * batch, batch, 1000, "stratified") for step in range(steps)])
    assert correlation(drawn, np.broadcast_to(np.arange(batch), drawn.shape)) < SIGMAS / math.sqrt(drawn.size)


@pytest.mark.parametrize(("timesteps", "clusters"), [(48, 8), (43, 8), (10, 3)])
def test_uw_draws_equally_from_each_cluster(timesteps, clusters):
    batch, steps = 8 * clusters, 200
    drawn = np.array([draw_timesteps(4, step * batch, batch, timesteps, "uw", clusters) for step in range(steps)])
    cluster = UncertaintyWeight(clusters, timesteps).cluster(torch.from_numpy(drawn)).numpy()
    for row in cluster:
        assert np.array_equal(np.bincount(row, minlength=clusters), np.full(clusters, 8))
    sizes = np.bincount(np.arange(timesteps) * clusters // timesteps)
    shares = np.repeat(1 / clusters / sizes, sizes)
    place = np.array([draw_timesteps(4, step * 5, 5, timesteps, "uw", clusters)[2] for step in range(60 * timesteps)])
    assert_uniform_counts(np.bincount(place, minlength=timesteps), len(place), shares)


@pytest.mark.parametrize("mode", ["uniform", "stratified", "uw"])
def test_continuous_times_are_uniform(mode):
    drawn = np.concatenate([draw_timesteps(5, step * 16, 16, None, mode)[:1] for step in range(5000)])
    assert_uniform_counts(np.histogram(drawn, bins=50, range=(0, 1))[0], len(drawn))


def test_label_drop_has_its_probability():
    index = np.arange(100_000)
    dropped = draw_label_drop(0, index, 0.1)
    assert dropped.dtype == np.bool_
    assert abs(dropped.mean() - 0.1) < SIGMAS * math.sqrt(0.1 * 0.9 / len(index))
    assert not draw_label_drop(0, index, 0.0).any() and draw_label_drop(0, index, 1.0).all()
    assert np.array_equal(draw_label_drop(0, index[40:60], 0.1), dropped[40:60])


def test_noise_is_independent_of_batching():
    together = normal_noise(9, np.arange(10, 16), (2, 3, 5), Purpose.NOISE)
    assert together.shape == (6, 2, 3, 5) and together.dtype == np.float32
    for row, index in enumerate(range(10, 16)):
        assert np.array_equal(normal_noise(9, [index], (2, 3, 5), Purpose.NOISE)[0], together[row])


def test_noise_is_standard_normal():
    noise = normal_noise(0, range(400), (500,), Purpose.NOISE).astype(np.float64)
    count = noise.size
    assert abs(noise.mean()) < SIGMAS / math.sqrt(count)
    assert abs(noise.var() - 1) < SIGMAS * math.sqrt(2 / count)  # variance of a squared normal: 2
    assert abs((noise**4).mean() - 3) < SIGMAS * math.sqrt(96 / count)  # 105 - 9


def test_noise_of_other_samples_seeds_streams_and_steps_is_independent():
    shape = (500,)
    base = normal_noise(0, range(100), shape, Purpose.NOISE)
    others = [normal_noise(1, range(100), shape, Purpose.NOISE), normal_noise(0, range(1, 101), shape, Purpose.NOISE)]
    others += [
        normal_noise(0, range(100), shape, Purpose.SAMPLE_STEP),
        normal_noise(0, range(100), shape, Purpose.NOISE, 1),
    ]
    for other in others:
        assert correlation(base, other) < SIGMAS / math.sqrt(base.size)


def test_draws_of_a_sample_are_pinned():
    """A generator that changes would change every run that is resumed."""
    pinned = np.array([-0.09406253695487976, -0.019822629168629646, -0.511910080909729, 0.9909359216690063], np.float32)
    np.testing.assert_array_equal(normal_noise(1, [2], (4,), Purpose.NOISE)[0], pinned)
    assert uniform(1, [2, 3], Purpose.TIMESTEP).tolist() == [0.24740147231065207, 0.7576265113978982]
    assert draw_timesteps(1, 0, 4, 1000, "stratified").tolist() == [222, 417, 811, 689]
