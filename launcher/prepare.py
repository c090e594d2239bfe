#!/usr/bin/env python3
"""Write training images as verified tar shards that the trainer reads (data.source: shards, data.path: FOLDER).

  prepare.py digits        --out FOLDER                        1,797 digits, 8 x 8 grey, 10 classes
  prepare.py fashion-mnist --out FOLDER --pad 32               60,000 pictures, 28 x 28 grey, 10 classes
  prepare.py folder  --images TREE --size 256 --out FOLDER     one subfolder of images for each class
  prepare.py latents --images TREE --size 256 --vae VAE --flip --out FOLDER
  prepare.py --verify FOLDER                                   check every shard and every sample

The same command again continues where it was stopped and keeps what is intact. --skip-bad may be added later.
If images were added to TREE, --add-images appends them in new shards. index.json is written last.
Exit status: 0 done, 64 wrong command line, 65 bad data, 74 file system error, 75 stopped (repeat it), 78 bad option.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launcher.command import Parser, exit_status, positive_int
from sdit.cli import run_command
from sdit.errors import ExitCode

if TYPE_CHECKING:
    from sdit.data.folders import FolderSource

IMAGES_PER_PROCESS = 4096  # a process takes seconds to start; on 8 x 8 pictures that is more than its work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit status."""
    parser = _command_line()
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.verify is None):
        parser.error("give a source (digits, fashion-mnist, folder, latents) or --verify FOLDER")
    logging.basicConfig(format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what a terminal cannot show
    return exit_status(lambda: _verify(options) if options.verify else _prepare(options))


def _command_line() -> argparse.ArgumentParser:
    parser = Parser("prepare", __doc__)
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="check a prepared folder instead of writing one")
    _add_jobs(parser, default=None)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", title="sources", parser_class=Parser)

    def add_source(name: str, text: str) -> argparse.ArgumentParser:
        return sources.add_parser(name, help=text, description=text)

    digits = add_source("digits", "the 8 x 8 digits of scikit-learn")
    fashion = add_source("fashion-mnist", "Fashion-MNIST from its four idx-ubyte.gz files")
    folder = add_source("folder", "a tree of images, as PNG")
    latents = add_source("latents", "a tree of images, as VAE posterior moments (pip install sdit[vae])")
    _add_fashion(fashion)
    for each in (folder, latents):
        _add_images(each)
    _add_vae(latents)
    for each in (digits, fashion, folder, latents):
        each.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write; made if missing")
        each.add_argument(
            "--samples-per-shard",
            type=positive_int,
            default=1024,
            metavar="N",
            help="samples in a shard; a rank holds a few whole shards in memory (default: %(default)s)",
        )
        _add_jobs(each, default=argparse.SUPPRESS)  # a default here would override --jobs before the source
    return parser


def _add_fashion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--files",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        metavar="FOLDER",
        help="where the files are (default: %(default)s, Debian's dataset-fashion-mnist)",
    )
    parser.add_argument("--split", choices=("train", "test"), default="train", help="60,000 or 10,000 (default: train)")
    parser.add_argument("--pad", type=int, metavar="PIXELS", help="add a black border up to this width, such as 32")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="TREE",
        help="one subfolder of images (png, jpg, webp, gif, bmp, tiff, ppm, pgm) for each class; without subfolders: "
        "unlabelled; of an animation the first frame is read",
    )
    parser.add_argument(
        "--size",
        type=positive_int,
        required=True,
        metavar="PIXELS",
        help="centre crop and resize the images to this square",
    )
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: grey, 3: RGB (default: 3)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read (default: stop)")
    parser.add_argument(
        "--background",
        type=_colour,
        metavar="COLOUR",
        help="white, black or R,G,B behind transparent pixels (default: the colours that they hide show, as in ADM)",
    )
    parser.add_argument(
        "--exif", action="store_true", help="turn images as their EXIF orientation says (default: do not, as in ADM)"
    )
    parser.add_argument(
        "--numeric-classes",
        action="store_true",
        help="sort class folders by number, so that 2 comes before 10 (default: sorted as text)",
    )
    parser.add_argument(
        "--allow-empty-classes", action="store_true", help="keep the labels of classes without images (default: stop)"
    )
    parser.add_argument(
        "--nested-classes",
        action="store_true",
        help="the subfolders are classes although they hold only folders or are called train, val (default: stop)",
    )
    parser.add_argument(
        "--add-images", action="store_true", help="append images that were added to TREE since FOLDER was written"
    )


def _colour(text: str) -> tuple[int, int, int]:
    named = {"white": (255, 255, 255), "black": (0, 0, 0)}
    if text in named:
        return named[text]
    values = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}; legal: white, black, or R,G,B with numbers from 0 to 255")
    return values[0], values[1], values[2]


def _add_vae(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vae",
        type=Path,
        required=True,
        metavar="VAE",
        help="local folder of a diffusers AutoencoderKL; nothing is fetched",
    )
    parser.add_argument(
        "--flip", action="store_true", help="also store mirrored images, for data.flip (twice the bytes)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the moments on disk (default: float32)"
    )
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="images per VAE pass (default: 16)")
    parser.add_argument("--device", default="cpu", help="of the VAE, such as cuda (default: cpu)")


def _add_jobs(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=default,
        metavar="N",
        help="processes (default: one per core and 4,096 images; with --device cuda: 1)",
    )


def _default_jobs(options: argparse.Namespace, images: int) -> int:
    if getattr(options, "device", "cpu") != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)), -(-images // IMAGES_PER_PROCESS))


def _verify(options: argparse.Namespace) -> int:
    from sdit.data.index import read_index
    from sdit.data.prepare import verify

    images = read_index(options.verify).facts.total
    index, problems = verify(options.verify, options.jobs or _default_jobs(options, images))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{options.verify}: {len(problems)} problems", file=sys.stderr)
        return ExitCode.DATA
    print(f"{options.verify}: {len(index.shards)} shards, {index.facts.total} {index.facts.kind}, all intact")
    return ExitCode.DONE


def _prepare(options: argparse.Namespace) -> int:
    # Imported late: numpy, torch and webdataset take seconds, and --help should not.
    from sdit.data.encoders import Encoder, latent_encoder, png_encoder
    from sdit.data.prepare import prepare
    from sdit.data.sources import PictureSource, digits_source, fashion_mnist_source

    source: PictureSource
    encoder: Encoder = png_encoder()
    if options.source == "digits":
        source = digits_source()
    elif options.source == "fashion-mnist":
        source = fashion_mnist_source(options.files, options.split, options.pad)
    else:
        if options.source == "latents":
            encoder = latent_encoder(options.vae, options.flip, options.dtype, options.batch, options.device)
        source = _folder_source(options)
    jobs = options.jobs or _default_jobs(options, len(source))
    skip_bad = getattr(options, "skip_bad", False)
    allow_empty = getattr(options, "allow_empty_classes", False)
    done = prepare(source, encoder, options.out, options.samples_per_shard, jobs, skip_bad, allow_empty)
    facts = done.index.facts
    print(
        f"{options.out}: {facts.total} {facts.kind} of {facts.channels} x {facts.size} x {facts.size}, "
        f"{facts.classes} classes; {done.written} shards written, {done.kept} kept, {done.skipped} pictures skipped"
    )
    return ExitCode.DONE


def _folder_source(options: argparse.Namespace) -> FolderSource:
    """The images of the command line; prints which label is which folder, and what is left out."""
    from sdit.data.folders import continued, folder_of_tree
    from sdit.data.picture import Reading
    from sdit.data.tree import read_tree, refuse_empty_classes, refuse_splits

    tree = read_tree(options.images, options.out, options.numeric_classes)
    if not options.nested_classes:
        refuse_splits(tree)
    reading = Reading(options.background, options.exif)
    source = folder_of_tree(tree, options.size, options.channels, reading, options.numeric_classes)
    if not options.allow_empty_classes:
        refuse_empty_classes(tree)
    source = continued(source, options.out, options.add_images)
    for line in (*tree.mapping(), *tree.left_out.lines()):
        print(line)
    return source


if __name__ == "__main__":
    run_command(main)
