"""What `sdit sample` and `sdit evaluate` share: which trained model samples images, how, and on which ranks."""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import add_rank_option, add_trained_options, positive_int
from sdit.contracts import Precision
from sdit.errors import ConfigError

if TYPE_CHECKING:
    from sdit.config import Config, SampleConfig
    from sdit.evaluate.generate import Generator
    from sdit.launch_environment import RankInfo

# Options that replace keys of the section `sample`.
SETTINGS = (
    "sampler", "steps", "guidance", "guidance_interval", "guided_channels", "time_shift", "diffusion_form", "diffusion_norm",
    "last_step", "last_step_size", "seed",
)  # fmt: skip


def add_model_options(add: Callable[..., Any]) -> None:
    """Add `--config`, `--weights` and `--vae`."""
    add_trained_options(add)
    vae_help = "folder of the AutoencoderKL that decodes latents (default: sample.vae)"
    add("--vae", type=Path, metavar="VAE", help=vae_help)


def add_sampler_options(add: Callable[..., Any]) -> None:
    """Add the options of SETTINGS. They are None if they are not given."""
    add("--sampler", metavar="NAME", help="ddpm, ddim, dpm++2m; euler, heun, sde for flow")
    add("--steps", type=int, metavar="N", help="sampling steps")
    add("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1: none")
    interval_help = "times from 0 (data) to 1 (noise) with guidance; a step outside costs half"
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval_help)
    add("--guided-channels", type=int, metavar="C", help="channels guidance acts on (Switch-DiT: all, DiT: 3)")
    add("--time-shift", type=float, metavar="S", help="flow: shift of the times; above 1: more steps at noise")
    forms = "constant, sigma (or linear), decreasing, increasing-decreasing"
    add("--diffusion-form", metavar="NAME", help=f"sde: diffusion coefficient: {forms}")
    add("--diffusion-norm", type=float, metavar="C", help="sde: factor of the diffusion coefficient")
    add("--last-step", metavar="NAME", help="sde: the last step, without noise: mean or euler")
    add("--last-step-size", type=float, metavar="T", help="sde: time of the last step, before the shift")
    add("--seed", type=int, metavar="N", help="seed of all noise")


def add_cost_options(add: Callable[..., Any]) -> None:
    """Add `--precision`, `--batch`, `--threads` and the launchers' option."""
    precision_help = "of the model's products; part of a score's settings (default: fp32)"
    add("--precision", choices=typing.get_args(Precision), default="fp32", help=precision_help)
    add("--batch", type=positive_int, default=64, metavar="N", help="images per rank and model call (default: 64)")
    add("--threads", type=positive_int, metavar="N", help="CPU threads per rank (default: its share of the cores)")
    add_rank_option(add)


def find_launch(options: argparse.Namespace) -> RankInfo:
    """Return this process's rank, and give it its share of the cores. Raises: ConfigError."""
    from sdit.distributed.comm import find_rank, set_threads

    info = find_rank(os.environ)
    set_threads(info, options.threads)
    return info


@contextmanager
def open_generator(options: argparse.Namespace, info: RankInfo) -> Iterator[Generator]:
    """Load the model and the decoder of the command line on all ranks, which are connected inside the `with`.

    Raises: CheckpointError, ConfigError.
    """
    from sdit.checkpoint.load import load_trained
    from sdit.distributed.comm import Comm
    from sdit.distributed.device import choose_device
    from sdit.evaluate.generate import Generator, check_precision, with_precision
    from sdit.train.decode import latent_decoder

    with Comm(info) if info.world > 1 else nullcontext() as comm:
        device = comm.device if comm is not None else choose_device(info, "auto")
        check_precision(options.precision, device)
        trained = load_trained(options.checkpoint, options.weights, options.config, device)
        trained = with_precision(trained, options.precision)
        settings = chosen_settings(trained.config, options)
        decoder = latent_decoder(trained.config, trained.data, options.vae, device)
        yield Generator(trained, settings, decoder, comm, options.batch)


def chosen_settings(config: Config, options: argparse.Namespace) -> SampleConfig:
    """Return the run's sampling settings, with those of the command line in their place.

    Raises: ConfigError: if a setting is not legal for this model.
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
