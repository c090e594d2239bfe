"""The averages of the weights and the learning-rate schedules: functions of the clock, and their reference numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sdit.checkpoint.snapshots import solve_coefficients
from sdit.clock import Clock, StepSpan, ema_decay, gamma_of, learning_rate_factor, power_decay
from sdit.config import EmaConfig, OptimizerConfig
from sdit.train.ema import Ema

DATA = Path(__file__).parents[1] / "data"
LENGTH = 10**9


@pytest.fixture(scope="module")
def vector() -> dict[str, np.ndarray]:
    with np.load(DATA / "recipe_ema.npz") as stored:
        return {name: stored[name] for name in stored.files}


def spans(vector: dict[str, np.ndarray]) -> list[StepSpan]:
    clock, found = Clock(), []
    for batch in vector["batches"].tolist():
        found.append(StepSpan(clock, clock.after(batch), LENGTH))
        clock = found[-1].clock
    assert [span.clock.images_seen for span in found] == vector["images"].tolist()
    return found


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, dtype=np.float64) - theirs) / np.linalg.norm(theirs))


def test_gamma_of_a_width(vector: dict[str, np.ndarray]) -> None:
    for widths, gammas in (("sigma_rel", "gamma"), ("target.sigma_rel", "target.gamma")):
        assert relative(np.array([gamma_of(float(width)) for width in vector[widths]]), vector[gammas]) < 1e-9


@pytest.mark.parametrize("sigma_rel", [1e-4, 0.01, 0.05, 0.1, 0.2, 0.288])
def test_gamma_solves_its_equation(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert gamma > 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)


@pytest.mark.parametrize("rule", ["constant", "warm", "power"])
def test_averages_in_float64(vector: dict[str, np.ndarray], rule: str) -> None:
    """The warm-up rule of the reference counts steps from 0. A run counts them from 1, as it always has."""
    settings = vector["gamma" if rule == "power" else "decays"].tolist()
    for setting, expected in zip(settings, vector[f"ema.{rule}"], strict=True):
        value, values = vector["start"], []
        for step, span in enumerate(spans(vector)):
            decay = power_decay(setting, span) if rule == "power" else ema_decay(setting, rule == "warm", step)
            value = decay * value + (1 - decay) * vector["theta"][step]
            values.append(value)
        assert relative(np.array(values), expected) < 1e-9


def shards_of(values: torch.Tensor) -> list[Any]:
    """Two shards of one vector, as an engine has them."""
    return [SimpleNamespace(master=part) for part in values.split([1, 2])]


def test_all_averages_of_a_run_in_float32(vector: dict[str, np.ndarray]) -> None:
    decays, widths = vector["decays"].tolist(), vector["sigma_rel"].tolist()
    config = EmaConfig(decay=decays[0], decays=decays[1:], sigma_rel=widths, warmup=False)
    weights = torch.from_numpy(vector["start"]).float()
    ema = Ema(config, shards_of(weights))
    found = []
    for span, theta in zip(spans(vector), vector["theta"], strict=True):
        weights.copy_(torch.from_numpy(theta))
        ema.update(span)
        found.append(torch.stack([torch.cat(average.values) for average in ema.averages]).numpy())
    expected = np.concatenate([vector["ema.constant"], vector["ema.power"]])
    for index, kind in enumerate(["ema", "ema-0.99", "ema-0.999", "ema-sigma-0.05", "ema-sigma-0.1"]):
        assert ema.averages[index].kind == kind
        assert relative(np.array(found)[:, index], expected[index]) < 1e-5, kind
    assert ema.values is ema.averages[0].values


def test_a_power_function_average_starts_at_the_weights_of_the_first_step() -> None:
    weights = torch.tensor([3.0, -1.0, 0.3])
    ema = Ema(EmaConfig(sigma_rel=[0.1]), shards_of(weights))
    weights.copy_(torch.tensor([1.0, 0.1, -7.7]))
    ema.update(StepSpan(Clock(), Clock().after(32), LENGTH))
    assert torch.equal(torch.cat(ema.power[0].values), weights)


def test_every_average_takes_the_warm_up_rule() -> None:
    ema = Ema(EmaConfig(decay=0.9999, decays=[0.1], warmup=True), shards_of(torch.zeros(3)))
    span = StepSpan(Clock(64, 4), Clock(96, 5), LENGTH)
    assert [average.decay_of(span) for average in ema.averages] == [6 / 15, 0.1]


def test_reconstruction(vector: dict[str, np.ndarray]) -> None:
    end = np.full(3, float(vector["images"][-1]))
    found = solve_coefficients(vector["snapshot.images"], vector["snapshot.gamma"], end, vector["target.gamma"])
    assert relative(found, vector["coefficients"]) < 1e-9
    assert relative(found.T @ vector["snapshot.value"], vector["reconstructed"]) < 1e-9
    kept = solve_coefficients(
        vector["snapshot.images"], vector["snapshot.gamma"], end[:1], vector["snapshot.gamma"][-1:]
    )
    assert np.abs(kept[:, 0] - np.eye(12)[-1]).max() < 1e-9  # a stored average is itself


def factors(total: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(**settings)
    return [learning_rate_factor(config, images, total) for images in range(10, total + 1, 10)]


def test_wsd_rises_stays_and_falls() -> None:
    found = factors(100, decay="wsd", warmup_images=20, decay_images=40, final_ratio=0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_falls_from_the_warm_up_on_if_the_decay_is_longer_than_the_rest() -> None:
    assert factors(60, decay="wsd", warmup_images=20, decay_images=1000) == factors(
        60, decay="linear", warmup_images=20
    )


def test_wsd_without_a_decay_in_reach_is_constant() -> None:
    """A longer run takes the same steps until its own decay begins, so a checkpoint before it can continue either."""
    short, long = (factors(total, decay="wsd", decay_images=30, warmup_images=20) for total in (100, 200))
    assert short[:7] == long[:7] and long[:17] == [0.5] + [1.0] * 16 and short[-1] == long[-1] == 0
