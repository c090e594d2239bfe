"""Laws of the noise schedules and of their thinning."""

from pathlib import Path

import numpy as np
import pytest

from sdit.diffusion.schedule import make_schedule
from sdit.errors import ConfigError

VECTORS = np.load(Path(__file__).parents[2] / "data" / "objective.npz")
EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_betas_equal_the_vectors(kind):
    # A cosine beta is 1 minus a ratio near 1, so its absolute error is a few float64 roundings of 1.
    np.testing.assert_allclose(make_schedule(kind).betas, VECTORS[f"{kind}.betas"], rtol=0, atol=4 * EPS)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("tag", "spacing"), [("10", "even"), ("ddim10", "leading")])
def test_thinned_timesteps_equal_the_vectors(kind, tag, spacing):
    thinned = make_schedule(kind).thinned(10, spacing)
    np.testing.assert_array_equal(thinned.timesteps, VECTORS[f"{kind}.{tag}.timestep_map"])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["even", "leading", "log_snr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 999, 1000])
def test_thinning_keeps_alpha_bar_at_rising_timesteps(kind, spacing, steps):
    full = make_schedule(kind)
    thinned = full.thinned(steps, spacing)
    assert len(thinned.timesteps) == steps
    assert np.all(np.diff(thinned.timesteps) > 0)
    assert thinned.timesteps[0] >= 0 and thinned.timesteps[-1] <= 999
    # `steps` products, each of a factor 1 - beta that carries one rounding of 1.
    wanted = full.alpha_bar[thinned.timesteps]
    relative = 2 * EPS * np.cumsum(1 / (1 - thinned.betas))
    assert np.all(np.abs(thinned.alpha_bar - wanted) <= wanted * relative)


@pytest.mark.parametrize("spacing", ["even", "leading", "log_snr"])
def test_thinning_to_all_steps_changes_no_timestep(spacing):
    np.testing.assert_array_equal(make_schedule("linear").thinned(1000, spacing).timesteps, np.arange(1000))


@pytest.mark.parametrize("spacing", ["even", "leading"])
@pytest.mark.parametrize("steps", [3, 7, 333, 700])
def test_even_and_leading_spacing_differ_by_one_timestep_at_most(spacing, steps):
    kept = make_schedule("cosine").thinned(steps, spacing).timesteps
    gaps = np.diff(kept, append=1000) if spacing == "leading" else np.diff(kept)
    assert kept[0] == 0 and gaps.max() - gaps.min() <= 1


def test_log_snr_spacing_is_even_in_log_snr_up_to_whole_timesteps():
    full = make_schedule("linear")
    kept = full.thinned(10, "log_snr").timesteps
    level = np.log(full.snr)
    wanted = np.linspace(level[0], level[-1], 10)
    half_way = np.maximum(np.abs(np.diff(level, prepend=np.inf)), np.abs(np.diff(level, append=-np.inf)))[kept]
    assert np.all(np.abs(level[kept] - wanted) <= half_way)
    assert (kept[0], kept[-1]) == (0, 999)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_reverse_variance_is_bayes(kind):
    """1/variance of q(x_{t-1} | x_t, x0) = prior precision + likelihood precision, and its mean is their average."""
    schedule = make_schedule(kind)
    t = np.arange(1, 1000)
    prior = 1 / (1 - schedule.alpha_bar[t - 1])
    likelihood = (1 - schedule.betas[t]) / schedule.betas[t]
    variance = 1 / (prior + likelihood)
    np.testing.assert_allclose(np.exp(schedule.log_variance_low[t]), variance, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_x0[t], variance * prior * schedule.alpha[t - 1], rtol=1e-9)
    slope = variance * np.sqrt(1 - schedule.betas[t]) / schedule.betas[t]
    np.testing.assert_allclose(schedule.posterior_x_t[t], slope, rtol=1e-9)
    assert schedule.posterior_x0[0] == pytest.approx(1) and schedule.posterior_x_t[0] == 0


def test_impossible_schedules_name_what_is_legal():
    with pytest.raises(ConfigError, match=r"timesteps: 1 .*legal: >= 2"):
        make_schedule("cosine", 1)
    with pytest.raises(ConfigError, match=r"timesteps: 20 .*legal: more than 20"):
        make_schedule("linear", 20)
    with pytest.raises(ConfigError, match=r"steps: 11 .*legal: 1\.\.10"):
        make_schedule("cosine", 10).thinned(11, "even")
