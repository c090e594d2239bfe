#!/usr/bin/env python3
"""Draw images from a trained run, or from a published checkpoint.

  sample.py --checkpoint runs/digits --out grid.png
  sample.py --checkpoint runs/digits --out grid.png --labels 3,5-7 --guidance 3 --steps 100
  sample.py --checkpoint runs/in256/checkpoints/images-000102400000 --images 50000 --npz samples.npz
  sample.py --checkpoint runs/latent256 --vae VAE_FOLDER --out grid.png
  sample.py --checkpoint Switch-DiT-S.pt --config configs/switch_s2.yaml --weights ema --out grid.png
  deepspeed launcher/sample.py --checkpoint runs/digits --images 50000 --npz samples.npz

Image i is a function of the weights, its label, --seed and i: the same on any number of ranks. Under a launcher
(deepspeed, torchrun, mpirun, srun) rank r of R draws images r, r + R, ...
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launcher.command import Parser, exit_status, positive_int, progress_bar
from sdit.cli import leave
from sdit.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    import numpy as np

    from sdit.config import Config, SampleConfig

SETTINGS = (
    "sampler",
    "steps",
    "guidance",
    "guided_channels",
    "seed",
)  # options that replace keys of the section sample
MAX_COLUMNS = 20

EPILOG = """\
what comes out:
  --out   a PNG grid of the first 400 images, row by row; how they were drawn is in its text chunks
  --npz   arr_0 (N, H, W, C) uint8 and arr_1 (N,) int64 labels, as evaluation code for ImageNet reads them
  --raw   (N, C, H, W) float32: pixels in [-1, 1], or, of a run on latents without --vae, scaled latents
  of a run on latents without --vae there is no picture: --out and --npz leave an npz of `latents` (N, C, H, W) float32 as
  the model draws them, `labels` (N,) and `latent_scale`, by which they are to be divided before they are decoded
which labels:
  neither --labels nor --images   the grid of the run's config: sample.classes rows, sample.images_per_class columns
  --labels                        sample.images_per_class images of each
  --images                        image i bears label number i of --labels, or of all classes, again and again
Settings that are not given are those of the run's config. Exit status: 0 done, 64 wrong command line,
74 unreadable checkpoint or unwritable file, 78 impossible setting.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("sample", __doc__, EPILOG)
    source = parser.add_argument_group("from what").add_argument
    source("--checkpoint", type=Path, required=True, metavar="RUN", help="run or checkpoint folder, or published file")
    source("--config", type=Path, metavar="YAML", help="config of a published file that does not carry its own")
    source("--weights", choices=("ema", "weight"), default="ema", help="averaged or last weights (default: ema)")
    source(
        "--vae", type=Path, metavar="VAE", help="folder of the AutoencoderKL that decodes latents (default: sample.vae)"
    )
    target = parser.add_argument_group("into what (one of them at least)").add_argument
    target("--out", type=Path, metavar="PNG", help="write a grid of the images")
    target("--npz", type=Path, metavar="NPZ", help="write all images as uint8, with labels")
    target("--raw", type=Path, metavar="NPY", help="write all images as float32")
    draw = parser.add_argument_group("which images, and how").add_argument
    draw(
        "--images",
        "--num",
        dest="num",
        type=positive_int,
        metavar="N",
        help="number of images (not --num under deepspeed)",
    )
    draw("--labels", type=_labels, metavar="LIST", help="such as 0,3,5-7")
    draw("--sampler", metavar="NAME", help="ddpm, ddim, dpm++2m; euler, heun for flow")
    draw("--steps", type=int, metavar="N", help="sampling steps")
    draw("--guidance", type=float, metavar="SCALE", help="classifier-free guidance; 1: none")
    draw("--guided-channels", type=int, metavar="C", help="channels guidance acts on (Switch-DiT: all, DiT: 3)")
    draw("--seed", type=int, metavar="N", help="seed of all noise")
    cost = parser.add_argument_group("at what cost").add_argument
    cost("--batch", type=positive_int, default=64, metavar="N", help="images per rank and model call (default: 64)")
    cost("--threads", type=positive_int, metavar="N", help="CPU threads per rank (default: its share of the cores)")
    cost("--local_rank", type=int, default=0, help="set by launchers; ignored, the environment is read")
    options = parser.parse_args(arguments)
    if not (options.out or options.npz or options.raw):
        parser.error("nothing to write; give --out, --npz or --raw")
    for name, suffix in (("out", ".png"), ("npz", ".npz"), ("raw", ".npy")):
        path = getattr(options, name)
        if path is not None and path.suffix != suffix:
            parser.error(f"--{name}: {path} does not end in {suffix}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    import torch  # seconds to import: not for --help and wrong command lines

    from sdit.evaluate.generate import generate
    from sdit.observe.image_files import ImageFiles
    from sdit.parallel.comm import Comm, find_rank, set_threads
    from sdit.train.checkpoint.load import load_trained
    from sdit.train.decode import draws_latents, latent_decoder

    info = find_rank(os.environ)
    set_threads(info, options.threads)
    with ExitStack() as stack:
        comm = stack.enter_context(Comm(info)) if info.world > 1 else None
        device = comm.device if comm is not None else "cuda" if torch.cuda.is_available() else "cpu"
        trained = load_trained(options.checkpoint, options.weights, options.config, device)
        settings = chosen_settings(trained.config, options)
        labels, columns = chosen_labels(trained.config, settings, options)
        decoder = latent_decoder(trained.config, options.vae, device)
        latents, grid, npz = None, options.out, options.npz
        if decoder is None and draws_latents(trained.config) and (grid or npz):
            latents, grid, npz = npz or grid.with_suffix(".npz"), None, None
        files = None
        if info.rank == 0:
            facts = {"checkpoint": trained.origin, "images_seen": trained.clock.images_seen, "weights": options.weights}
            facts |= settings.model_dump(include={"sampler", "steps", "guidance", "guided_channels", "seed"})
            if decoder is not None:
                facts |= {"vae_sha256": decoder.digest, "latent_scale": trained.config.data.latent_scale}
            scale = trained.config.data.latent_scale
            files = stack.enter_context(ImageFiles(grid, npz, options.raw, labels, columns, facts, latents, scale))
        show = stack.enter_context(progress_bar("step", f"{len(labels)} images")) if files is not None else None
        for images in generate(trained, settings, labels, comm, options.batch, show, decode=decoder):
            if files is not None:
                files.add(images)
    if files is not None:
        for path in (grid, npz, options.raw, latents):
            if path is not None:
                print(path)
        if latents is not None:
            channels = trained.config.model.channels
            print(
                f"no picture: the model draws latents of {channels} channels, kept in {latents}; --vae FOLDER decodes them"
            )
    return ExitCode.DONE


def chosen_settings(config: Config, options: argparse.Namespace) -> SampleConfig:
    """The run's sampling settings with those of the command line in their place. Raises: ConfigError."""
    from sdit.configfile import parse_config
    from sdit.diffusion import SamplerSettings

    given = {key: value for key in SETTINGS if (value := getattr(options, key)) is not None}
    values = config.model_dump(mode="json")
    settings = parse_config({**values, "sample": {**values["sample"], **given}}, "command line").sample
    SamplerSettings.from_config(config.diffusion, settings, config.model.timesteps)
    if settings.guided_channels is not None and settings.guided_channels > config.model.channels:
        legal = f"legal: 1..{config.model.channels} (model.channels)"
        raise ConfigError(f"sample.guided_channels: {settings.guided_channels} is out of range; {legal}")
    return settings


def chosen_labels(config: Config, settings: SampleConfig, options: argparse.Namespace) -> tuple[np.ndarray, int]:
    """Label (N,) int64 of every image, and the columns of the grid. Raises: ConfigError."""
    import numpy as np

    from sdit.train.sampling import grid_labels

    classes, columns = config.model.classes, settings.images_per_class
    if options.labels and max(options.labels) >= classes:
        legal = f"0..{classes - 1} (model.classes {classes})" if classes else "none, the model is unconditional"
        raise ConfigError(f"--labels: {max(options.labels)} is no class of the model; legal: {legal}")
    if options.num is not None:
        cycle = options.labels or range(max(1, classes))
        labels = np.resize(np.asarray(cycle, dtype=np.int64), options.num)
        return labels, len(cycle) if len(cycle) <= MAX_COLUMNS else math.isqrt(min(options.num, MAX_COLUMNS**2) - 1) + 1
    if options.labels:
        return np.repeat(np.asarray(options.labels, dtype=np.int64), columns), columns
    return grid_labels(config), columns


def _labels(text: str) -> list[int]:
    """Labels in a list such as 0,3,5-7."""
    matches = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in text.split(",")]
    spans = [range(int(match[1]), int(match[2] or match[1]) + 1) for match in matches if match is not None]
    if len(spans) < len(matches) or not all(spans):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of labels; legal: numbers and ranges, such as 0,3,5-7")
    return [label for span in spans for label in span]


if __name__ == "__main__":
    leave(main())
