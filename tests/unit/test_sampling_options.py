"""Options of `sdit sample` and `sdit evaluate` replace keys of `sample`, and are checked with the run's config."""

from __future__ import annotations

from typing import Any

import pytest

from sdit.cli import sample
from sdit.cli.sampling import SETTINGS, chosen_settings
from sdit.config import Config, load_config
from sdit.errors import ConfigError
from sdit.train.engine_setup import check_run

FLOW: dict[str, Any] = {
    "model": {"learn_variance": False}, "diffusion": {"path": "flow"}, "sample": {"sampler": "euler"},
}  # fmt: skip


def chosen(config: dict[str, Any], *words: str) -> dict[str, Any]:
    options = sample.parse(["--checkpoint", "run", "--out", "grid.png", *words])
    return chosen_settings(Config.model_validate(config), options).model_dump(include=set(SETTINGS))


def test_every_option_replaces_its_key() -> None:
    given: dict[str, Any] = {
        "sampler": "sde", "steps": 30, "guidance": 2.5, "guidance_interval": [0.1, 0.875], "guided_channels": 3,
        "time_shift": 3.0, "diffusion_form": "constant", "diffusion_norm": 0.5, "last_step": "euler", "last_step_size": 0.1,
        "seed": 4,
    }  # fmt: skip
    words = []
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{key.replace('_', '-')}", *map(str, values)]
    assert set(given) == set(SETTINGS) and chosen(FLOW, *words) == given
    assert chosen(FLOW)["guidance_interval"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("config", "words", "line"),
    [
        (FLOW, ["--sampler", "ddim"], "sample.sampler: ddim with diffusion.path flow; legal: euler, heun, sde"),
        ({}, ["--time-shift", "3"], "sample.time_shift: 3 with diffusion.path diffusion; legal: 1"),
        (FLOW, ["--time-shift", "0"], "sample.time_shift: 0.0 is not legal"),
        (FLOW, ["--guidance-interval", "0.5", "0.2"], "sample.guidance_interval: .* legal: .low, high. with 0 <= low"),
        (FLOW, ["--diffusion-form", "SBDM"], "sample.diffusion_form: 'SBDM' is not legal"),
        (FLOW, ["--diffusion-norm", "0"], "sample.diffusion_norm: 0.0 is not legal"),
        (FLOW, ["--last-step", "tweedie"], "sample.last_step: 'tweedie' is not legal"),
        (FLOW, ["--last-step-size", "1"], "sample.last_step_size: 1.0 is not legal"),
    ],
)
def test_options_that_make_no_sense_are_refused(config: dict[str, Any], words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        chosen(config, *words)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["diffusion.timestep_sampling=normal"], "diffusion.timestep_sampling: 'normal' is not legal .*logit_normal"),
        (["diffusion.logit_mean=a"], "diffusion.logit_mean: 'a' is not legal .legal: a number."),
        (["diffusion.logit_std=0"], "diffusion.logit_std: 0 is not legal .*greater than 0"),
        (["diffusion.time_shift=-1"], "diffusion.time_shift: -1 is not legal .*greater than 0"),
        (["diffusion.weighting=uw", "diffusion.time_shift=3"], "diffusion.time_shift: 3 with weighting uw; legal"),
        (
            ["diffusion.direction_weight=1"],
            "diffusion.direction_weight: 1 needs a velocity; legal with path diffusion: 0",
        ),
        (["diffusion.path=flow", "diffusion.contrastive_weight=1"], "diffusion.contrastive_weight: 1 is not legal"),
        (
            ["diffusion.path=flow", "diffusion.contrastive_weight=0.1", "train.global_batch=1"],
            "train.global_batch: 1 with diffusion.contrastive_weight 0.1; legal: >= 2",
        ),
        (["prior.axis=t"], "prior.axis: 't' is not legal .*'time' or 'quantile'"),
        (["sample.guidance_interval=[0.1]"], "sample.guidance_interval: .0.1. is not an interval; legal"),
        (["sample.guidance_interval=0.1"], "sample.guidance_interval: 0.1 is not legal"),
        (["sample.last_step_size=0"], "sample.last_step_size: 0 is not legal"),
    ],
)
def test_keys_that_make_no_sense_are_refused_with_the_config(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_a_shift_of_sampling_is_refused_before_a_run_begins() -> None:
    class Run:
        config = load_config(None, ["sample.time_shift=3", "train.steps=1"])

    run: Any = Run()
    with pytest.raises(ConfigError, match=r"sample\.time_shift: 3 with diffusion\.path diffusion; legal: 1"):
        check_run(run)
