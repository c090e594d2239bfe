"""Draw images from a trained run, or from a published checkpoint.

  sdit sample --checkpoint runs/digits --out grid.png
  sdit sample --checkpoint runs/digits --out grid.png --labels 3,5-7 --guidance 3 --steps 100
  sdit sample --checkpoint runs/in256/checkpoints/images-000102400000 --images 50000 --npz samples.npz
  sdit sample --checkpoint runs/latent256 --vae VAE_FOLDER --out grid.png
  sdit sample --checkpoint Switch-DiT-S.pt --config switch_s2.yaml --weights ema --out grid.png
  deepspeed launcher/sample.py --checkpoint runs/digits --images 50000 --npz samples.npz

Image i is a function of the weights, its label, --seed and i: the same on any number of ranks. Under a launcher
(deepspeed, torchrun, mpirun, srun) rank r of R draws images r, r + R, ...
"""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdit.cli.parser import Parser, positive_int
from sdit.cli.process import command, progress_bar, run_command
from sdit.cli.sampling import (
    SETTINGS,
    add_cost_options,
    add_model_options,
    add_sampler_options,
    find_launch,
    open_generator,
)
from sdit.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    import numpy as np

    from sdit.checkpoint.load import Trained
    from sdit.config import SampleConfig
    from sdit.evaluate.generate import Generator

MAX_COLUMNS = 20

EPILOG = """\
what comes out:
  --out   a PNG grid of the first 400 images, row by row; how they were drawn is in its text chunks
  --npz   arr_0 (N, H, W, C) uint8 and arr_1 (N,) int64 labels, as evaluation code for ImageNet reads them
  --raw   (N, C, H, W) float32: pixels in [-1, 1], or, of a run on latents without --vae, scaled latents
  of a run on latents without --vae there is no image: --out and --npz leave an npz of `latents` (N, C, H, W) float32 as
  the model draws them, `labels` (N,) and `latent_scale`, by which they are to be divided before they are decoded;
  of a run with data.latent_stats also `latent_mean` and `latent_std`: decode latents / latent_scale * std + mean
which labels:
  neither --labels nor --images   the grid of the run's config: sample.classes rows, sample.images_per_class columns
  --labels                        sample.images_per_class images of each
  --images                        image i bears label number i of --labels, or of all classes, again and again
  Classes that no training image had are never drawn.
how to name labels:
  3  5-7  Trouser                 label 3, labels 5 to 7, the class that is called Trouser; several between commas
  '"tench, Tinca tinca"'          a name with commas, in double quotes; not needed if it is the whole LIST
  tabby cat                       the class "tabby, tabby cat": one of its names is enough, if no other class has it
  name:10  label:10               the class that is called 10, and label number 10; a plain 10 is a label number, and is
                                  refused if another label is called 10
Settings that are not given are those of the run's config. Exit status: 0 done, 64 wrong command line,
74 unreadable checkpoint or unwritable file, 78 impossible setting.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("sample", __doc__, EPILOG)
    source = parser.add_argument_group("from what").add_argument
    source("--checkpoint", type=Path, required=True, metavar="RUN", help="run or checkpoint folder, or published file")
    add_model_options(source)
    target = parser.add_argument_group("into what (one of them at least)").add_argument
    target("--out", type=Path, metavar="PNG", help="write a grid of the images")
    target("--npz", type=Path, metavar="NPZ", help="write all images as uint8, with labels")
    target("--raw", type=Path, metavar="NPY", help="write all images as float32")
    draw = parser.add_argument_group("which images, and how").add_argument
    images_help = "number of images (not --num under deepspeed)"
    draw("--images", "--num", dest="num", type=positive_int, metavar="N", help=images_help)
    labels_help = "labels or class names, such as 0,3,5-7 or Trouser,Bag; may be given several times; see below"
    draw("--labels", type=_label_list, action="append", metavar="LIST", help=labels_help)
    add_sampler_options(draw)
    cost = parser.add_argument_group("at what cost").add_argument
    add_cost_options(cost)
    options = parser.parse_args(arguments)
    if not (options.out or options.npz or options.raw):
        parser.error("nothing to write; give --out, --npz or --raw")
    parser.check_suffixes(options, out=".png", npz=".npz", raw=".npy")
    return options


def run(options: argparse.Namespace) -> int:
    from sdit.observe.image_files import ImageFiles  # torch takes seconds to import: not for --help
    from sdit.train.decode import draws_latents, latent_scaling

    info = find_launch(options)
    with ExitStack() as stack:
        generator = stack.enter_context(open_generator(options, info))
        trained, settings = generator.trained, generator.settings
        labels, columns = chosen_labels(trained, settings, options)
        latents, grid, npz = None, options.out, options.npz
        if generator.decoder is None and draws_latents(trained.config, trained.data) and (grid or npz):
            latents, grid, npz = npz or grid.with_suffix(".npz"), None, None
        files = show = None
        if info.rank == 0:
            facts = image_facts(generator, options.weights, labels)
            scaling = latent_scaling(trained.config, trained.data) if latents is not None else None
            files = stack.enter_context(ImageFiles(grid, npz, options.raw, labels, columns, facts, latents, scaling))
            show = stack.enter_context(progress_bar("step", f"{len(labels)} images"))
        for images in generator.images(labels, progress=show):
            if files is not None:
                files.add(images)
    if info.rank == 0:
        for path in filter(None, (grid, npz, options.raw, latents)):
            print(path)
        if latents is not None:
            kept = f"latents of {trained.config.model.channels} channels, kept in {latents}"
            print(f"no image: the model draws {kept}; --vae FOLDER decodes them")
    return ExitCode.DONE


def image_facts(generator: Generator, weights: str, labels: np.ndarray) -> dict[str, Any]:
    """Return how images were sampled, for the text chunks of a PNG."""
    trained, decoder = generator.trained, generator.decoder
    facts = {"checkpoint": trained.origin, "images_seen": trained.clock.images_seen, "weights": weights}
    facts |= generator.settings.model_dump(include=set(SETTINGS)) | {"precision": trained.precision}
    facts["labels"] = trained.classes.describe_all(labels.tolist())
    if decoder is not None:
        facts |= {"vae_sha256": decoder.digest, **decoder.scaling.facts}
    return facts


def chosen_labels(trained: Trained, settings: SampleConfig, options: argparse.Namespace) -> tuple[np.ndarray, int]:
    """Label (N,) int64 of every image, of the trained classes, and the columns of the grid. Raises: ConfigError."""
    import numpy as np

    from sdit.data.classes import choose_labels
    from sdit.train.sampling import grid_labels

    classes, columns = trained.classes, settings.images_per_class
    chosen = [label for text in options.labels or () for label in choose_labels(text, classes, "--labels")]
    if options.num is not None:
        cycle = chosen or classes.labels or [0]
        labels = np.resize(np.asarray(cycle, dtype=np.int64), options.num)
        return labels, len(cycle) if len(cycle) <= MAX_COLUMNS else math.isqrt(min(options.num, MAX_COLUMNS**2) - 1) + 1
    if chosen:
        return np.repeat(np.asarray(chosen, dtype=np.int64), columns), columns
    return grid_labels(settings, classes), columns


def _label_list(text: str) -> str:
    """An option's type: a list of labels and class names, which the checkpoint decides on."""
    from sdit.data.classes import check_label_syntax

    try:
        check_label_syntax(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


main = command(parse, run)

if __name__ == "__main__":
    run_command(main)
