"""Laws of the training loss."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sdit.config import DiffusionConfig
from sdit.diffusion import build_objective, make_schedule
from sdit.diffusion.prediction import target_of, x0_of
from sdit.errors import ConfigError

VECTORS = {
    key: torch.from_numpy(value) for key, value in np.load(Path(__file__).parents[2] / "data" / "objective.npz").items()
}
PREDICTIONS = ["epsilon", "x0", "v"]


def answer(output):
    """A model that returns `output` whatever it is asked."""
    return lambda x, t, y: output


def random_batch(batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(batch, 3, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.randint(0, 1000, (batch,), generator=generator)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noised_images_equal_the_vectors(schedule):
    x_t = build_objective({"schedule": schedule}).q_sample(VECTORS["x0"], VECTORS["t"], VECTORS["noise"])
    torch.testing.assert_close(x_t, VECTORS[f"{schedule}.x_t"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["constant", "min_snr_5"])
def test_losses_equal_the_vectors(schedule, weighting):
    objective = build_objective({"schedule": schedule, "weighting": weighting})
    model = answer(VECTORS["model_output"])
    parts = objective(model, VECTORS["x0"], VECTORS["t"], None, VECTORS["noise"])
    for ours, theirs in (("mse", "mse"), ("vlb", "vb"), ("loss", "loss")):
        torch.testing.assert_close(getattr(parts, ours), VECTORS[f"{schedule}.{weighting}.{theirs}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_target_has_zero_loss_and_leads_back_to_x0(schedule, prediction):
    x0, noise, t = (tensor.double() if tensor.is_floating_point() else tensor for tensor in random_batch())
    tables = make_schedule(schedule)
    alpha, sigma = (torch.from_numpy(row)[t][:, None, None, None] for row in (tables.alpha, tables.sigma))
    target = target_of(prediction, x0, noise, alpha, sigma)
    x_t = alpha * x0 + sigma * noise
    back = x0_of(prediction, x_t, target, alpha, sigma)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-14 / alpha.min().item())
    parts = build_objective({"schedule": schedule, "prediction": prediction})(answer(target), x0, t, None, noise)
    assert parts.mse.max() < (4 * torch.finfo(torch.float32).eps) ** 2 * 10  # float32 rounding of targets near 1..3


def test_the_bound_trains_the_variance_alone():
    x0, noise, t = random_batch()
    t[0] = 0
    output = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parts = build_objective({})(answer(output), x0, t, None, noise)
    (from_bound,) = torch.autograd.grad(parts.vlb.sum(), output, retain_graph=True)
    (from_error,) = torch.autograd.grad(parts.mse.sum(), output)
    assert torch.all(from_bound[:, :3] == 0) and torch.all(from_bound[:, 3:].flatten(1).abs().sum(1) > 0)
    assert torch.all(from_error[:, 3:] == 0) and torch.all(from_error[:, :3].flatten(1).abs().sum(1) > 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_depends_on_x0_not_on_what_is_predicted(prediction):
    x0, noise, _ = random_batch()
    t = torch.tensor([0, 10, 200, 500, 800])
    tables = make_schedule("linear")
    alpha, sigma = (torch.from_numpy(row)[t][:, None, None, None] for row in (tables.alpha, tables.sigma))
    x_t = alpha * x0 + sigma * noise
    guess = x0.double() + 0.1 * sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    epsilon = (x_t - alpha * guess) / sigma
    variance = torch.zeros_like(x0)
    bounds = []
    for kind in ("x0", prediction):
        output = torch.cat([target_of(kind, guess, epsilon, alpha, sigma), variance], dim=1)
        bounds.append(build_objective({"prediction": kind})(answer(output), x0, t, None, noise).vlb)
    # The x0 error 0.1 * sigma is a float32 difference of numbers up to 4: off by 2^-22 / (0.1 * sigma) at most.
    torch.testing.assert_close(*bounds, rtol=0.01, atol=2**-22 / (0.1 * sigma.min().item()))


def test_a_model_without_variance_has_no_bound():
    x0, noise, t = random_batch()
    parts = build_objective({})(answer(torch.zeros_like(x0)), x0, t, None, noise)
    assert torch.all(parts.vlb == 0)
    torch.testing.assert_close(parts.loss, noise.square().mean((1, 2, 3)))


def test_losses_are_float32_for_a_bfloat16_model_and_a_cast_objective():
    x0, noise, t = random_batch()
    exact = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = build_objective({"weighting": "min_snr_5"})(answer(exact.float()), x0, t, None, noise)
    objective = build_objective({"weighting": "min_snr_5"}).bfloat16()
    parts = objective(answer(exact), x0, t, None, noise)
    for key in ("mse", "vlb", "loss"):
        assert getattr(parts, key).dtype == torch.float32
        assert torch.equal(getattr(parts, key), getattr(wanted, key))


def test_the_models_output_is_handed_on():
    @dataclass
    class Output:
        prediction: torch.Tensor

    x0, noise, t = random_batch()
    output = Output(noise)
    parts = build_objective({})(answer(output), x0, t, None, noise)
    assert parts.output is output and torch.all(parts.mse == 0)


def test_a_loss_does_not_depend_on_the_rest_of_the_batch():
    objective = build_objective({"schedule": "cosine", "weighting": "p2"})
    x0, noise, t = random_batch()
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))

    def model(x, t, y):
        return torch.einsum("bchw,dc->bdhw", x, weight)

    whole = objective(model, x0, t, None, noise).loss
    alone = torch.cat(
        [objective(model, *(part[i : i + 1] for part in (x0, t)), None, noise[i : i + 1]).loss for i in range(5)]
    )
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=0)


def test_missing_noise_is_drawn_fresh():
    x0, _, t = random_batch()
    objective, model = build_objective({}), answer(torch.zeros_like(x0))
    assert not torch.equal(objective(model, x0, t, None).mse, objective(model, x0, t, None).mse)


def test_times_of_the_flow_path_are_floats_for_the_model():
    """An integer is a time too: 1 is pure noise, and not the first of the timesteps."""
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor, y: object) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    x0 = torch.ones(2, 3, 4, 4)
    build_objective({"path": "flow"})(model, x0, torch.tensor([0, 1]), None, torch.zeros_like(x0))
    assert seen[0].dtype == torch.float32 and seen[0].tolist() == [0.0, 1.0]


def test_flow_loss_is_zero_for_the_true_velocity_alone():
    x0, noise, _ = random_batch()
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    asked = []

    def model(x, t, y):
        asked.append((x, t))
        return noise - x0

    parts = build_objective({"path": "flow"})(model, x0, t, None, noise)
    assert torch.all(parts.loss == 0) and torch.all(parts.vlb == 0)
    x_t, seen_t = asked[0]
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[-1], noise[-1]) and torch.equal(seen_t, t)
    torch.testing.assert_close(x_t[2], (x0[2] + noise[2]) / 2)
    off_by_one = build_objective({"path": "flow"})(answer(noise - x0 + 1), x0, t, None, noise)
    torch.testing.assert_close(off_by_one.mse, torch.ones(5))


@pytest.mark.parametrize(
    ("config", "mode_law"),
    [
        ({"timestep_sampling": "stratified"}, lambda t: np.array_equal(np.sort(t) * 8 // 1000, np.arange(8))),
        ({"weighting": "uw"}, lambda t: np.array_equal(np.sort(t // 125), np.arange(8))),
        (
            {"path": "flow", "timestep_sampling": "stratified"},
            lambda t: np.array_equal(np.sort(t * 8 // 1), np.arange(8)),
        ),
    ],
)
def test_timesteps_are_drawn_as_the_config_says(config, mode_law):
    assert all(mode_law(build_objective(config).draw_timesteps(1, 8 * step, 8)) for step in range(20))


def test_a_section_and_its_keys_build_the_same_objective():
    section = build_objective(DiffusionConfig(schedule="cosine"), timesteps=100)
    keys = build_objective({"schedule": "cosine", "timesteps": 100})
    assert section.config == keys.config and section.timesteps == keys.timesteps == 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weighing": "p2"}, r"diffusion\.weighing: "),
        ({"weighting": "snr"}, r"diffusion\.weighting: .*legal: constant, min_snr_<gamma>"),
        ({"schedule": "cubic"}, r"diffusion\.schedule: .*'linear' or 'cosine'"),
        ({"path": "flow", "weighting": "p2"}, r"legal with path flow: constant, uw"),
    ],
)
def test_wrong_keys_are_config_errors_of_one_line(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_objective(keys)
    assert "\n" not in str(caught.value)


def test_wrong_channel_counts_are_config_errors():
    x0, noise, t = random_batch()
    with pytest.raises(ConfigError, match=r"returned 4 channels for 3; legal: 3, or 6"):
        build_objective({})(answer(torch.zeros(5, 4, 4, 4)), x0, t, None, noise)
    with pytest.raises(ConfigError, match=r"learn_variance: true .*legal: false"):
        build_objective({"path": "flow"})(answer(torch.zeros(5, 6, 4, 4)), x0, t / 1000, None, noise)
