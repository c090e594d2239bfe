"""Samplers against Gaussian data, whose score, ODE solution and chain of moments are known exactly."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sdit.config import DiffusionConfig, SampleConfig
from sdit.diffusion import SamplerSettings, make_schedule, sample, trajectory
from sdit.diffusion.samplers.clipping import clip_x0
from sdit.diffusion.samplers.discrete import ReverseProcess, ddim_step, dpm_solver_2m
from sdit.diffusion.schedule import Schedule
from sdit.errors import ConfigError

VECTORS = np.load(Path(__file__).parents[2] / "data" / "objective.npz")
MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian data
SIGMAS = 5.0  # a correct sampler is further out than this with probability 6e-7


def gaussian_variance(schedule, t):
    """Variance of x_t."""
    return schedule.alpha_bar[t] * DEVIATION**2 + 1 - schedule.alpha_bar[t]


def perfect_epsilon(schedule):
    """The best epsilon for data N(MEAN, DEVIATION^2): E[noise | x_t]."""

    def predict(x, t, y):
        return float(schedule.sigma[t] / gaussian_variance(schedule, t)) * (x - float(schedule.alpha[t]) * MEAN)

    return predict


def perfect_velocity(x, t, y):
    """E[noise - x0 | x_t] on the straight path."""
    centred = x - (1 - t) * MEAN
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return t * centred / variance - (MEAN + (1 - t) * DEVIATION**2 * centred / variance)


def grid():
    return torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)


def vector_process(schedule, sampler):
    output = torch.from_numpy(VECTORS["model_output"])
    settings = SamplerSettings(sampler=sampler, steps=10, schedule=schedule)
    return ReverseProcess(lambda x, t, y: output, torch.zeros(16), settings, 0, range(16))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "tag"), [("ddpm", "10"), ("ddim", "ddim10")])
def test_reverse_step_equals_the_vectors(schedule, sampler, tag):
    process = vector_process(schedule, sampler)
    x = torch.from_numpy(VECTORS["x0"])
    mean, log_variance = process.posterior(x, 5)
    torch.testing.assert_close(mean, torch.from_numpy(VECTORS[f"{schedule}.{tag}.step5_mean"]), rtol=1e-5, atol=1e-6)
    wanted = torch.from_numpy(VECTORS[f"{schedule}.{tag}.step5_logvar"])
    torch.testing.assert_close(log_variance, wanted, rtol=1e-5, atol=1e-6)
    if sampler == "ddim":
        stepped = torch.from_numpy(VECTORS[f"{schedule}.{tag}.step5"])
        torch.testing.assert_close(ddim_step(process, x, 5), stepped, rtol=1e-5, atol=2e-6)


def discrete_error(sampler, intervals, schedule_kind):
    """Distance to the exact ODE solution, over a grid that is even in t, with `intervals` + 1 steps."""
    schedule = make_schedule(schedule_kind, 1025)
    settings = SamplerSettings(
        sampler=sampler, steps=intervals + 1, schedule=schedule_kind, timesteps=1025, spacing="even"
    )
    predict, x = perfect_epsilon(schedule), grid()
    # Along the ODE (x_t - alpha_t MEAN) / std(x_t) stays as it is; the last step turns x at t = 0 into its x0.
    standard = (x - schedule.alpha[-1] * MEAN) / math.sqrt(gaussian_variance(schedule, -1))
    at_0 = schedule.alpha[0] * MEAN + math.sqrt(gaussian_variance(schedule, 0)) * standard
    exact = (at_0 - schedule.sigma[0] * predict(at_0, 0, None)) / schedule.alpha[0]
    return (sample(predict, x, None, settings) - exact).abs().max().item()


def flow_error(sampler, steps):
    settings = SamplerSettings(sampler=sampler, steps=steps, path="flow")
    return (sample(perfect_velocity, grid(), None, settings) - (MEAN + DEVIATION * grid())).abs().max().item()


def assert_order(order, coarse, fine):
    """Halving the step divides the error by 2^order: the measured order is nearer to `order` than to any other."""
    assert abs(math.log2(coarse / fine) - order) < 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++2m", 2)])
def test_diffusion_sampler_converges_to_the_ode_at_its_order(sampler, order, schedule):
    assert_order(order, *(discrete_error(sampler, intervals, schedule) for intervals in (128, 256)))


@pytest.mark.parametrize(("first", "second"), [(0.3, 0.1), (0.1, 0.3)])
def test_dpm_solver_follows_a_linear_x0_over_steps_of_any_length(first, second):
    """For x0 = l, half the log-SNR, a step h from l is known: x sigma'/sigma + alpha' (h - 1 + e^-h + l (1 - e^-h))."""
    level = np.array([0.0, -second, -second - first])  # from the data's side
    alpha_bar = 1 / (1 + np.exp(-2 * level))
    uneven = Schedule(1 - alpha_bar / np.append(1, alpha_bar[:-1]), np.arange(3))
    settings = SamplerSettings(sampler="dpm++2m", steps=3, prediction="x0")
    process = ReverseProcess(lambda x, t, y: torch.full_like(x, level[t]), None, settings, 0, range(1))
    process.schedule = uneven
    before, after, _ = dpm_solver_2m(process, grid())
    h = second
    gained = h - 1 + math.exp(-h) + level[1] * (1 - math.exp(-h))
    exact = uneven.sigma[0] / uneven.sigma[1] * before + uneven.alpha[0] * gained
    # The solver takes x0 at mid-step: with h/2 (1 - e^-h) for h - 1 + e^-h it is off by h^3/12 - h^4/24 + ...
    assert (after - exact).abs().max() <= uneven.alpha[0] * h**3 / 12


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_flow_sampler_converges_to_the_ode_at_its_order(sampler, order):
    assert_order(order, *(flow_error(sampler, steps) for steps in (64, 128)))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_beats_ddim_at_twenty_steps(schedule):
    predict = perfect_epsilon(make_schedule(schedule))
    exact = MEAN + DEVIATION * grid()
    errors = {
        name: (sample(predict, grid(), None, SamplerSettings(sampler=name, steps=20, schedule=schedule)) - exact)
        for name in ("ddim", "dpm++2m")
    }
    assert errors["dpm++2m"].abs().max() < errors["ddim"].abs().max()


def assert_moments(x, mean, deviation):
    """Mean and deviation of `x` are within SIGMAS standard errors of a Gaussian's."""
    count = x.numel()
    assert abs(x.mean().item() - mean) < SIGMAS * deviation / math.sqrt(count)
    assert abs(x.std().item() - deviation) < SIGMAS * deviation / math.sqrt(2 * count)


def start_of_chain(schedule, batch=64):
    """Draws of x at the last timestep."""
    noise = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return schedule.alpha[-1] * MEAN + math.sqrt(gaussian_variance(schedule, -1)) * noise


@pytest.mark.parametrize("steps", [5, 50])
def test_ddpm_with_the_true_variance_draws_the_data(steps):
    """The learned variance can be the true one of x_{t-1} given x_t, for any length of step."""
    full = make_schedule("linear")
    settings = SamplerSettings(sampler="ddpm", steps=steps)
    thin = settings.thinned_schedule()
    epsilon = perfect_epsilon(full)

    def predict(x, t, y):
        step = int(np.searchsorted(thin.timesteps, t))
        spread_of_x0 = DEVIATION**2 * (1 - full.alpha_bar[t]) / gaussian_variance(full, t)
        low, high = math.exp(thin.log_variance_low[step]), thin.betas[step]
        share = (
            math.log((low + thin.posterior_x0[step] ** 2 * spread_of_x0) / low) / math.log(high / low) if step else 0
        )
        return torch.cat([epsilon(x, t, y), torch.full_like(x, 2 * share - 1)], dim=1)

    x0 = sample(predict, start_of_chain(full), None, settings, seed=1)
    last = full.alpha[0] * DEVIATION**2 / math.sqrt(gaussian_variance(full, 0))  # the last step takes E[x0 | x_0]
    assert_moments(x0, MEAN, last)


@pytest.mark.parametrize("fixed_variance", ["small", "large"])
def test_ddpm_with_fixed_variance_has_the_moments_of_its_chain(fixed_variance):
    full = make_schedule("linear")
    settings = SamplerSettings(sampler="ddpm", steps=20, fixed_variance=fixed_variance)
    thin = settings.thinned_schedule()
    variance = gaussian_variance(full, -1)
    for step in range(19, 0, -1):  # E[x_{t-1} | x_t] has slope cov(x_{t-1}, x_t) / var(x_t)
        slope = math.sqrt(1 - thin.betas[step]) * gaussian_variance(thin, step - 1) / gaussian_variance(thin, step)
        posterior = thin.betas[step] * (1 - thin.alpha_bar[step - 1]) / (1 - thin.alpha_bar[step])
        variance = slope**2 * variance + (posterior if fixed_variance == "small" else thin.betas[step])
    slope = thin.alpha[0] * DEVIATION**2 / gaussian_variance(thin, 0)
    x0 = sample(perfect_epsilon(full), start_of_chain(full), None, settings, seed=2)
    assert_moments(x0, MEAN, slope * math.sqrt(variance))


def test_ddim_with_full_eta_equals_ddpm():
    predict = perfect_epsilon(make_schedule("linear"))
    ddpm, ddim = (
        sample(predict, grid(), None, SamplerSettings(sampler=name, steps=10, eta=1.0, spacing="even"), seed=3)
        for name in ("ddpm", "ddim")
    )
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-10)


def test_ddim_noise_is_proportional_to_eta():
    predict = perfect_epsilon(make_schedule("linear"))
    spread = {}
    for eta in (0.25, 1.0):
        settings = SamplerSettings(sampler="ddim", steps=10, eta=eta)
        one, other = (next(trajectory(predict, grid(), None, settings, seed=seed)) for seed in (0, 1))
        spread[eta] = one - other
    torch.testing.assert_close(4 * spread[0.25], spread[1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_images_do_not_depend_on_batching(sampler):
    predict = perfect_epsilon(make_schedule("linear"))
    settings = SamplerSettings(sampler=sampler, steps=6, eta=0.5, clip_x0="dynamic")
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(4))
    together = sample(predict, noise, None, settings, seed=5, indices=range(10, 16))
    parts = [
        sample(predict, noise[rows], None, settings, seed=5, indices=indices)
        for rows, indices in ((slice(0, 4), range(10, 14)), (slice(4, 6), [14, 15]))
    ]
    assert torch.equal(torch.cat(parts), together)
    assert not torch.equal(together, sample(predict, noise, None, settings, seed=6, indices=range(10, 16)))


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_what_is_predicted_does_not_change_the_images(sampler, prediction):
    schedule = make_schedule("linear")
    epsilon = perfect_epsilon(schedule)

    def predict(x, t, y):
        noise, alpha, sigma = epsilon(x, t, y), float(schedule.alpha[t]), float(schedule.sigma[t])
        x0 = (x - sigma * noise) / alpha
        return x0 if prediction == "x0" else alpha * noise - sigma * x0

    wanted = sample(epsilon, grid(), None, SamplerSettings(sampler=sampler, steps=10))
    images = sample(predict, grid(), None, SamplerSettings(sampler=sampler, steps=10, prediction=prediction))
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-10)


def test_clipped_x0_and_epsilon_still_make_up_x_t():
    """Epsilon is recomputed from the clipped x0."""
    settings = SamplerSettings(sampler="ddim", steps=50, schedule="cosine", clip_x0="fixed", clip_range=0.7)
    process = ReverseProcess(lambda x, t, y: 0.9 * x, None, settings, 0, [0])
    x = grid()
    for step in (0, 25, 49):
        denoised = process.denoise(x, step)
        alpha, sigma = process.schedule.alpha[step], process.schedule.sigma[step]
        assert denoised.x0.abs().max() <= 0.7
        torch.testing.assert_close(alpha * denoised.x0 + sigma * denoised.epsilon, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_clipping_tames_the_first_step_of_the_cosine_schedule(sampler):
    """It goes from alpha 5e-5 to 0.03 and so multiplies an error of epsilon by hundreds, unless x0 is clipped."""
    schedule = make_schedule("cosine")
    epsilon = perfect_epsilon(schedule)

    def after_first_step(error, clip):
        settings = SamplerSettings(sampler, 50, schedule="cosine", spacing="even", clip_x0=clip, clip_range=2.0)
        return next(trajectory(lambda x, t, y: epsilon(x, t, y) + error, grid(), None, settings))

    right = after_first_step(0.0, "none")
    assert (after_first_step(0.01, "none") - right).abs().max() > 100 * 0.01
    furthest = 4.0 * (schedule.alpha[979] + schedule.alpha[999])  # x0 is off by 4 at most, between -2 and 2
    assert (after_first_step(0.01, "fixed") - right).abs().max() <= furthest


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_clipping_holds_on_the_flow_path(sampler):
    settings = SamplerSettings(sampler=sampler, steps=8, path="flow", clip_x0="fixed", clip_range=0.4)
    images = sample(perfect_velocity, 3 * grid(), None, settings)
    assert images.abs().max() <= 0.4 + 1e-12
    wide = SamplerSettings(sampler=sampler, steps=8, path="flow", clip_x0="fixed", clip_range=100.0)
    plain = SamplerSettings(sampler=sampler, steps=8, path="flow")
    torch.testing.assert_close(*(sample(perfect_velocity, grid(), None, s) for s in (wide, plain)), rtol=0, atol=1e-12)


def test_dynamic_clipping_shrinks_each_image_by_its_own_percentile():
    settings = SamplerSettings(clip_x0="dynamic", clip_range=1.0, clip_percentile=0.9)
    ramp = torch.linspace(0.1, 1.0, 10).reshape(1, 1, 2, 5)
    images = torch.cat([0.5 * ramp, -4 * ramp])
    clipped = clip_x0(images, settings)
    assert torch.equal(clipped[0], images[0])  # already within the range
    cut = 4 * 0.9  # nine of ten values are at most this large
    torch.testing.assert_close(clipped[1], images[1].clamp(min=-cut) / cut)


@pytest.mark.parametrize(
    ("path", "sampler", "evaluations"),
    [
        ("diffusion", "ddpm", 7),
        ("diffusion", "ddim", 7),
        ("diffusion", "dpm++2m", 7),
        ("flow", "euler", 7),
        ("flow", "heun", 13),
    ],
)
def test_progress_and_evaluations_are_counted(path, sampler, evaluations):
    asked, seen = [], []

    def predict(x, t, y):
        asked.append(t)
        return torch.zeros_like(x)

    settings = SamplerSettings(sampler=sampler, steps=7, path=path)
    images = sample(predict, grid(), None, settings, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(done, 7) for done in range(1, 8)]
    assert len(asked) == evaluations and all(type(t) is (float if path == "flow" else int) for t in asked)
    assert asked == sorted(asked, reverse=True)
    states = list(trajectory(predict, grid(), None, settings))
    assert len(states) == 7 and torch.equal(states[-1], images)


def test_low_precision_predictions_are_integrated_in_float32():
    settings = SamplerSettings(sampler="dpm++2m", steps=4)
    images = sample(lambda x, t, y: x.bfloat16(), grid().bfloat16(), None, settings)
    assert images.dtype == torch.float32 and torch.isfinite(images).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_the_last_step_returns_the_networks_own_x0(sampler):
    schedule = make_schedule("linear")
    epsilon = perfect_epsilon(schedule)
    *_, before, x0 = trajectory(epsilon, grid(), None, SamplerSettings(sampler=sampler, steps=10))
    wanted = (before - schedule.sigma[0] * epsilon(before, 0, None)) / schedule.alpha[0]
    torch.testing.assert_close(x0, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize("steps", [1, 2])
def test_very_few_steps_still_give_finite_images(sampler, steps):
    predict = perfect_epsilon(make_schedule("cosine"))
    settings = SamplerSettings(sampler=sampler, steps=steps, schedule="cosine")
    assert torch.isfinite(sample(predict, grid(), None, settings)).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler": "euler"}, r"sampler: euler with diffusion\.path diffusion; legal: ddpm, ddim, dpm\+\+2m"),
        ({"sampler": "ddim", "path": "flow"}, r"sampler: ddim with diffusion\.path flow; legal: euler, heun"),
        ({"steps": 0}, r"sample\.steps: 0 .*legal: >= 1"),
        ({"steps": 101, "timesteps": 100}, r"sample\.steps: 101 .*legal: 1\.\.100"),
        ({"eta": 1.5}, r"eta: 1\.5 .*legal: 0\.\.1"),
    ],
)
def test_impossible_settings_name_what_is_legal(keys, message):
    with pytest.raises(ConfigError, match=message):
        SamplerSettings(**keys)


def test_flow_refuses_a_learned_variance():
    settings = SamplerSettings(sampler="euler", steps=2, path="flow")
    with pytest.raises(ConfigError, match="learn_variance"):
        sample(lambda x, t, y: torch.cat([x, x], dim=1), grid(), None, settings)


def test_settings_follow_the_run():
    diffusion = DiffusionConfig(schedule="cosine", prediction="v", clip_x0="dynamic", clip_range=0.9)
    settings = SamplerSettings.from_config(diffusion, SampleConfig(sampler="dpm++2m", steps=12), timesteps=100)
    assert (settings.sampler, settings.steps, settings.timesteps) == ("dpm++2m", 12, 100)
    assert (settings.schedule, settings.prediction, settings.clip_x0, settings.clip_range) == (
        "cosine",
        "v",
        "dynamic",
        0.9,
    )
