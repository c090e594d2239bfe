"""Shifted times, the guidance interval and the SDE sampler, on a mixture of Gaussians whose velocity is exact."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.config import DiffusionConfig, ModelConfig, SampleConfig
from sdit.diffusion import SamplerSettings, trajectory
from sdit.diffusion.draws import draw_step_noise
from sdit.errors import ConfigError
from sdit.model import DiffusionTransformer, build_model
from sdit.train.sampling import sample_images
from tests.cases.commands import ROOT

NUMBERS = np.load(ROOT / "tests" / "data" / "recipe_sampling.npz")
CASES: dict[str, dict[str, Any]] = json.loads(str(NUMBERS["cases"]))
MEAN, STD, WEIGHT = (torch.from_numpy(NUMBERS[f"mix.{name}"]) for name in ("mean", "std", "weight"))
START, LABELS = torch.from_numpy(NUMBERS["start"]), torch.from_numpy(NUMBERS["y"])
SEED, NULL = int(NUMBERS["sde.seed"]), len(WEIGHT)


def velocity(x: Tensor, t: float, y: Tensor) -> Tensor:
    """Return E[noise - x0 | x_t = x] (B, C, H, W), where label k is component k and NULL is all of them."""
    mean, std, weight = (values.to(x.dtype) for values in (MEAN, STD, WEIGHT))
    away = x[:, None] - (1 - t) * mean
    variance = ((1 - t) * std) ** 2 + t**2
    log_share = weight.log() - 0.5 * (away**2).flatten(2).sum(-1) / variance - 0.5 * x[0].numel() * variance.log()
    only = torch.where((y[:, None] == torch.arange(NULL)) | (y[:, None] == NULL), log_share, -torch.inf)
    share = only.softmax(1)[..., None, None, None]
    noise = t / variance[:, None, None, None] * away
    x0 = mean + ((1 - t) * std**2 / variance)[:, None, None, None] * away
    return (share * (noise - x0)).sum(1)


def settings_of(case: dict[str, Any]) -> SamplerSettings:
    return SamplerSettings(path="flow", **{key: value for key, value in case.items() if key != "guidance"})


def test_the_field_is_that_of_the_reference() -> None:
    null = torch.full_like(LABELS, NULL)
    for index, t in enumerate(NUMBERS["field.t"].tolist()):
        for labels, name in ((LABELS, "velocity"), (null, "null_velocity")):
            np.testing.assert_allclose(
                velocity(START, t, labels), NUMBERS[f"field.{name}"][index], rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", CASES)
def test_samplers_are_those_of_the_specification(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    settings, scale, times = settings_of(case), case.get("guidance", 1.0), []

    def predict(x: Tensor, t: int | float, y: Tensor) -> Tensor:
        times.append(t)
        conditional = velocity(x, t, y)
        if scale == 1 or not settings.guides_at(t):
            return conditional
        return torch.lerp(velocity(x, t, torch.full_like(y, NULL)), conditional, scale)

    for found, expected in zip(
        trajectory(predict, START.to(dtype), LABELS, settings, SEED), NUMBERS[f"{name}.x"], strict=True
    ):
        want = torch.from_numpy(expected)
        assert torch.linalg.vector_norm(found - want) <= tolerance * torch.linalg.vector_norm(want)
    visited = list(dict.fromkeys(times))
    np.testing.assert_allclose([*visited, 0.0], NUMBERS[f"{name}.t"], rtol=1e-9)
    assert len(times) == (2 * case["steps"] - 1 if case["sampler"] == "heun" else case["steps"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["sampler"] == "sde"])
def test_the_noise_of_an_sde_step_is_keyed_by_a_number_that_counts_down(name: str) -> None:
    noise, steps = NUMBERS[f"{name}.noise"], CASES[name]["steps"]
    for index, expected in enumerate(noise):
        found = draw_step_noise(SEED, np.arange(len(START)), steps - 1 - index, START)
        assert np.array_equal(found.numpy(), expected)


def test_an_interval_of_a_diffusion_path_is_in_timesteps_over_all() -> None:
    settings = SamplerSettings(guidance_interval=NUMBERS["discrete.interval"].tolist())
    assert [settings.guides_at(int(t)) for t in NUMBERS["discrete.t"]] == NUMBERS["discrete.guided"].tolist()


def test_one_sde_step_ends_at_the_data() -> None:
    settings = SamplerSettings(sampler="sde", steps=1, path="flow", last_step="euler")
    (x,) = trajectory(velocity, START, LABELS, settings)
    assert torch.allclose(x, START - velocity(START, 1.0, LABELS))


class Counting(torch.nn.Module):
    """A network that counts its calls and the images in them."""

    def __init__(self, model: DiffusionTransformer) -> None:
        super().__init__()
        self.inner, self.images = model, []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Any:
        self.images.append(len(x))
        return self.inner(x, t, y)


@pytest.mark.parametrize(
    ("path", "sampler", "interval", "doubled"),
    [
        ("flow", "euler", [0.25, 0.75], [False, True, True, True]),  # t = 1, 0.75, 0.5, 0.25
        ("flow", "heun", [0.5, 0.75], [False, True, True, True, True, False, False]),
        ("flow", "sde", [0.0, 0.5], [False, False, True, True]),  # t = 1, 0.68, 0.36, 0.04
        ("diffusion", "ddim", [0.5, 1.0], [True, True, False, False]),  # timesteps 30, 20, 10, 0 of 40
    ],
)
def test_outside_the_interval_the_network_sees_each_image_once(
    path: str, sampler: str, interval: list[float], doubled: list[bool]
) -> None:
    config = {
        "depth": 1, "width": 16, "heads": 2, "patch_size": 2, "input_size": 4, "channels": 1, "classes": 3, "timesteps": 40,
        "learn_variance": False, "experts": {"count": 2, "top_k": 1},
    }  # fmt: skip
    model: Any = Counting(build_model(ModelConfig.model_validate(config)).eval())
    settings = SampleConfig(sampler=sampler, steps=4, guidance=2.0, guidance_interval=interval)  # type: ignore[arg-type]
    with torch.no_grad():
        sample_images(model, DiffusionConfig(path=path), settings, np.arange(3), np.arange(3))  # type: ignore[arg-type]
    assert model.images == [6 if twice else 3 for twice in doubled]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"time_shift": 3.0}, "sample.time_shift: 3 with diffusion.path diffusion; legal: 1"),
        ({"sampler": "sde"}, "sample.sampler: sde with diffusion.path diffusion; legal: ddpm, ddim, dpm\\+\\+2m"),
        ({"path": "flow", "sampler": "ddpm"}, "legal: euler, heun, sde"),
        ({"path": "flow", "sampler": "euler", "time_shift": 0.0}, "sample.time_shift: 0.0 is not legal"),
        (
            {"guidance_interval": (0.5, 0.2)},
            "sample.guidance_interval: \\[0.5, 0.2\\] is not an interval; legal: \\[low",
        ),
        ({"guidance_interval": (0.5,)}, "sample.guidance_interval: \\[0.5\\] is not an interval"),
        ({"path": "flow", "sampler": "sde", "diffusion_form": "SBDM"}, "sample.diffusion_form: 'SBDM' is not legal"),
        ({"path": "flow", "sampler": "sde", "diffusion_norm": -1.0}, "sample.diffusion_norm: -1.0 is not legal"),
        ({"path": "flow", "sampler": "sde", "last_step": "tweedie"}, "sample.last_step: 'tweedie' is not legal"),
        ({"path": "flow", "sampler": "sde", "last_step_size": 1.0}, "sample.last_step_size: 1.0 is not legal"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        SamplerSettings(**keys)
