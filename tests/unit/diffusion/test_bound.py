"""The variational bound against textbook formulas in float64."""

import math

import torch
from torch.distributions import Normal, kl_divergence

from sdit.diffusion import build_objective, make_schedule
from sdit.diffusion.losses import decoder_bits, kl_bits

BATCH, SHAPE = 6, (2, 4, 4)
LINEAR = make_schedule("linear")


def normal_pair(t):
    """x0, x_t, predicted x0 and a log variance between the bounds at step t, float64."""
    generator = torch.Generator().manual_seed(t)
    x0, noise, error = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    share = torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    log_variance = share * LINEAR.log_variance_high[t] + (1 - share) * LINEAR.log_variance_low[t]
    x_t = LINEAR.alpha[t] * x0 + LINEAR.sigma[t] * noise
    return x0, x_t, x0 + 0.3 * error * LINEAR.sigma[t], log_variance


def kl_by_definition(t, x0, x_t, predicted_x0, log_variance):
    """KL between the two Gaussians over x_{t-1}, from their means and deviations, in bits."""
    low = torch.tensor(LINEAR.log_variance_low[t])
    true_mean, mean = (LINEAR.posterior_x0[t] * x + LINEAR.posterior_x_t[t] * x_t for x in (x0, predicted_x0))
    return kl_divergence(Normal(true_mean, (low / 2).exp()), Normal(mean, (log_variance / 2).exp())) / math.log(2)


def test_kl_equals_the_kl_of_the_two_gaussians():
    for t in (1, 2, 100, 999):
        x0, x_t, predicted, log_variance = normal_pair(t)
        low = torch.tensor(LINEAR.log_variance_low[t])
        bits = kl_bits(predicted - x0, torch.tensor(LINEAR.posterior_x0[t]), low, log_variance)
        # The textbook form cancels terms of order 1; 1e-12 of 1 is some thousand float64 roundings.
        torch.testing.assert_close(bits, kl_by_definition(t, x0, x_t, predicted, log_variance), rtol=1e-9, atol=1e-12)


def normal_cdf(x):
    return torch.special.ndtr(x)


def worst_cdf_error():
    """How far the tanh form is from the normal CDF anywhere."""
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    tanh_form = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return (tanh_form - normal_cdf(x)).abs().max().item()


def test_decoder_is_the_gaussian_mass_of_the_grey_level():
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)
    deviation = torch.full_like(x0, 0.01)
    error = 0.005 * torch.sin(torch.arange(256, dtype=torch.float64))
    upper = normal_cdf((x0 + 1 / 255 - (x0 + error)) / deviation)
    lower = normal_cdf((x0 - 1 / 255 - (x0 + error)) / deviation)
    upper[-1], lower[0] = 1.0, 0.0  # the outermost grey levels reach to infinity
    mass = upper - lower
    tolerance = 2 * worst_cdf_error() / (mass - 2 * worst_cdf_error()) / math.log(2)  # of -log2, by its slope 1/mass
    bits = decoder_bits(x0, error, 2 * deviation.log())
    assert worst_cdf_error() < 4e-4
    assert torch.all((bits + mass.log2()).abs() <= tolerance)


def test_grey_levels_share_out_all_mass():
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean = torch.tensor(0.137, dtype=torch.float64)
    mass = 2 ** -decoder_bits(x0, mean - x0, torch.full_like(x0, 2 * math.log(0.02)))
    assert abs(mass.sum().item() - 1) < 256 * 1e-12  # the floor under each level's mass


def test_objective_reports_the_bound_of_each_timestep():
    """Through the float32 objective: decoder bits at t = 0, the KL elsewhere, times T / 1000."""
    for timesteps in (1000, 500):
        schedule = make_schedule("linear", timesteps)
        objective = build_objective({"schedule": "linear"}, timesteps)
        t = torch.tensor([0, 1, 2, 50, 250, timesteps - 1])
        generator = torch.Generator().manual_seed(0)
        x0, noise, variance = (torch.randn(BATCH, *SHAPE, generator=generator) for _ in range(3))
        epsilon = noise + 0.3 * torch.randn(BATCH, *SHAPE, generator=generator)
        output = torch.cat([epsilon, variance], dim=1)
        parts = objective(lambda x, t, y, output=output: output, x0, t, torch.zeros(BATCH), noise)
        for row, step in enumerate(t.tolist()):
            error = -schedule.sigma[step] / schedule.alpha[step] * (epsilon - noise)[row].double()
            share = (variance[row].double() + 1) / 2
            low = torch.tensor(schedule.log_variance_low[step])
            log_variance = share * schedule.log_variance_high[step] + (1 - share) * low
            if step == 0:
                bits = decoder_bits(x0[row].double(), error, log_variance)
            else:
                shift = schedule.posterior_x0[step] * error
                models = Normal(shift, (log_variance / 2).exp())
                bits = kl_divergence(Normal(torch.zeros_like(shift), (low / 2).exp()), models) / math.log(2)
            expected = bits.mean() * timesteps / 1000
            torch.testing.assert_close(parts.vlb[row].double(), expected, rtol=1e-5, atol=1e-7)
