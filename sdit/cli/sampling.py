"""Options that `sdit sample` and `sdit evaluate` share: which trained model, and how images are drawn from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import add_trained_options
from sdit.errors import ConfigError

if TYPE_CHECKING:
    from sdit.config import Config, SampleConfig

SETTINGS = (
    "sampler",
    "steps",
    "guidance",
    "guided_channels",
    "seed",
)  # options that replace keys of the section sample


def add_model_options(add: Callable[..., Any]) -> None:
    """Add `--config`, `--weights` and `--vae`."""
    add_trained_options(add)
    vae_help = "folder of the AutoencoderKL that decodes latents (default: sample.vae)"
    add("--vae", type=Path, metavar="VAE", help=vae_help)


def add_sampler_options(add: Callable[..., Any]) -> None:
    """Add the options of SETTINGS. They are None if they are not given."""
    add("--sampler", metavar="NAME", help="ddpm, ddim, dpm++2m; euler, heun for flow")
    add("--steps", type=int, metavar="N", help="sampling steps")
    add("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1: none")
    add("--guided-channels", type=int, metavar="C", help="channels guidance acts on (Switch-DiT: all, DiT: 3)")
    add("--seed", type=int, metavar="N", help="seed of all noise")


def chosen_settings(config: Config, options: argparse.Namespace) -> SampleConfig:
    """Return the run's sampling settings, with those of the command line in their place.

    Raises:
        ConfigError: a setting is not legal for this model.
    """
    from sdit.config import parse_config
    from sdit.diffusion import SamplerSettings

    given = {key: value for key in SETTINGS if (value := getattr(options, key)) is not None}
    values = config.model_dump(mode="json")
    settings = parse_config({**values, "sample": {**values["sample"], **given}}, "command line").sample
    SamplerSettings.from_config(config.diffusion, settings, config.model.timesteps)
    if settings.guided_channels is not None and settings.guided_channels > config.model.channels:
        legal = f"legal: 1..{config.model.channels} (model.channels)"
        raise ConfigError(f"sample.guided_channels: {settings.guided_channels} is out of range; {legal}")
    return settings
