"""Every loss weight against its formula, written out for one sample at a time."""

import math

import pytest
import torch

from sdit.diffusion import build_objective, make_schedule
from sdit.diffusion.losses import UncertaintyWeight
from sdit.errors import ConfigError

T_VALUES = torch.tensor([0, 1, 99, 124, 125, 500, 998, 999])
SNR = make_schedule("cosine").snr


def weigh(config, t=T_VALUES, **keys):
    """Errors 1, 2, 3, ... and what the objective's weighting makes of them."""
    mse = torch.arange(1.0, len(t) + 1)
    weighting = build_objective({"schedule": "cosine", "weighting": config, **keys}).weighting
    return mse.tolist(), weighting(mse, t).tolist()


def test_constant_leaves_the_error_alone():
    mse, weighted = weigh("constant")
    assert weighted == mse


@pytest.mark.parametrize("gamma", [5.0, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_min_snr_follows_its_formula(prediction, gamma):
    mse, weighted = weigh(f"min_snr_{gamma}", prediction=prediction)
    for t, before, after in zip(T_VALUES.tolist(), mse, weighted, strict=True):
        share = {"epsilon": SNR[t], "x0": 1.0, "v": SNR[t] + 1}[prediction]
        assert after == pytest.approx(before * min(SNR[t], gamma) / share, rel=1e-6)


def test_min_snr_weighs_the_same_x0_error_alike_for_every_prediction():
    generator = torch.Generator().manual_seed(0)
    x0, noise, shift = (torch.randn(len(T_VALUES) - 1, 1, 4, 4, generator=generator) for _ in range(3))
    t, losses = T_VALUES[:-1], {}  # at t = 999 of the cosine schedule v and x0 differ by more than float32 holds
    alpha, sigma = (torch.tensor(row)[t].float()[:, None, None, None] for row in (SCHEDULE.alpha, SCHEDULE.sigma))
    wrong_x0 = x0 + 0.1 * shift
    wrong_noise = noise - alpha / sigma * 0.1 * shift  # the noise that leads from wrong_x0 to the same x_t
    outputs = {"epsilon": wrong_noise, "x0": wrong_x0, "v": alpha * wrong_noise - sigma * wrong_x0}
    for prediction, output in outputs.items():
        objective = build_objective({"schedule": "cosine", "weighting": "min_snr_5", "prediction": prediction})
        losses[prediction] = objective(lambda x, t, y, output=output: output, x0, t, None, noise).mse
    # Errors of size 0.1 * alpha/sigma are differences of numbers up to 1 + that size, in float32.
    worst = 2**-22 * max(1.0, (sigma / alpha).max().item() / 0.1)
    torch.testing.assert_close(losses["epsilon"], losses["x0"], rtol=worst, atol=0)
    torch.testing.assert_close(losses["v"], losses["x0"], rtol=worst, atol=0)


SCHEDULE = make_schedule("cosine")


@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_p2_follows_its_formula_per_sample(k, gamma):
    mse, weighted = weigh("p2", p2_k=k, p2_gamma=gamma)
    for t, before, after in zip(T_VALUES.tolist(), mse, weighted, strict=True):
        assert after == pytest.approx(before / (k + SNR[t]) ** gamma, rel=1e-6)


def test_uncertainty_follows_its_formula_with_the_log_scale_of_the_cluster():
    objective = build_objective({"weighting": "uw"})
    scales = [0.1 * c - 0.3 for c in range(8)]
    with torch.no_grad():
        objective.weighting.log_scale.copy_(torch.tensor(scales))
    mse = torch.arange(1.0, len(T_VALUES) + 1)
    for t, before, after in zip(T_VALUES.tolist(), mse.tolist(), objective.weighting(mse, T_VALUES), strict=True):
        s = scales[t // 125]
        assert after.item() == pytest.approx(0.5 * (math.exp(-s) * before + s), rel=1e-6)


def test_uncertainty_rests_where_its_scale_is_the_log_of_the_loss():
    weighting = UncertaintyWeight(1, 10)
    with torch.no_grad():
        weighting.log_scale.fill_(math.log(0.25))
    weighting(torch.tensor([0.25, 0.25]), torch.tensor([0, 9])).sum().backward()
    assert weighting.log_scale.grad.abs().item() < 2**-22


def test_uncertainty_is_the_only_weighting_with_parameters():
    assert [name for name, _ in build_objective({"weighting": "uw"}).named_parameters()] == ["weighting.log_scale"]
    for config in ("constant", "min_snr_5", "p2"):
        assert not list(build_objective({"weighting": config}).parameters())


def test_uncertainty_splits_continuous_time_into_equal_clusters():
    t = torch.tensor([0.0, 0.124, 0.126, 0.99, 1.0])
    assert UncertaintyWeight(8, None).cluster(t).tolist() == [0, 0, 1, 7, 7]


def test_more_clusters_than_timesteps_are_refused():
    with pytest.raises(ConfigError, match=r"uw_clusters: 30 .*legal: 1\.\.25"):
        build_objective({"weighting": "uw", "uw_clusters": 30}, timesteps=25)
