"""`sdit prepare`: write training images as shards. Its manual and its options are in `prepare_options.py`."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.cli.prepare_options import ARCHIVES, SOURCES, command_line
from sdit.cli.process import exit_status
from sdit.errors import ExitCode

if TYPE_CHECKING:
    from sdit.data.folders import FolderSource

IMAGES_PER_PROCESS = 4096  # a process takes seconds to start; on 8 x 8 images that is more than its work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit status."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.verify is None):
        parser.error(f"give a source ({', '.join(SOURCES)}) or --verify FOLDER")
    logging.basicConfig(format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what a terminal cannot show
    return exit_status(lambda: _verify(options) if options.verify else _prepare(options))


def _default_jobs(options: argparse.Namespace, images: int) -> int:
    if getattr(options, "device", "cpu") != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)), -(-images // IMAGES_PER_PROCESS))


def _verify(options: argparse.Namespace) -> int:
    from sdit.data.dataset import is_tar_index
    from sdit.data.index import read_index
    from sdit.data.prepare import verify, verify_tars

    if is_tar_index(options.verify):
        tars, problems = verify_tars(options.verify, options.jobs or 1)
        return _report(options.verify, problems, f"{len(tars.shards)} tars, {tars.total} images")
    images = read_index(options.verify).facts.total
    index, problems = verify(options.verify, options.jobs or _default_jobs(options, images))
    return _report(options.verify, problems, f"{len(index.shards)} shards, {index.facts.total} {index.facts.kind}")


def _report(folder: Path, problems: list[str], content: str) -> int:
    """Print the problems of a folder, or that its content is intact. Return the exit status."""
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"{folder}: {len(problems)} problems", file=sys.stderr)
        return ExitCode.DATA
    print(f"{folder}: {content}, all intact")
    return ExitCode.DONE


def _prepare(options: argparse.Namespace) -> int:
    # Imported late: numpy, torch and webdataset take seconds, and --help should not.
    from sdit.cli.prepare_archives import archive_source, index_command, latent_source
    from sdit.data.encoders import Encoder, latent_encoder, moments_encoder, png_encoder
    from sdit.data.prepare import prepare
    from sdit.data.sources import ImageSource, digits_source, fashion_mnist_source

    if options.source == "index":
        return index_command(options)
    source: ImageSource
    encoder: Encoder = png_encoder()
    if options.source == "digits":
        source = digits_source()
    elif options.source == "fashion-mnist":
        source = fashion_mnist_source(options.files, options.split, options.pad)
    elif options.source == "latent-shards":
        source, encoder = latent_source(options), moments_encoder()
    else:
        if getattr(options, "vae", None) is not None:
            encoder = latent_encoder(options.vae, options.flip, options.dtype, options.batch, options.device)
        source = archive_source(options) if options.source in ARCHIVES else _folder_source(options)
    jobs = options.jobs or _default_jobs(options, len(source))
    skip_bad = getattr(options, "skip_bad", False)
    allow_empty = getattr(options, "allow_empty_classes", False)
    done = prepare(source, encoder, options.out, options.samples_per_shard, jobs, skip_bad, allow_empty)
    facts = done.index.facts
    print(
        f"{options.out}: {facts.total} {facts.kind} of {facts.channels} x {facts.size} x {facts.size}, "
        f"{facts.classes} classes; {done.written} shards written, {done.kept} kept, {done.skipped} images skipped"
    )
    return ExitCode.DONE


def _folder_source(options: argparse.Namespace) -> FolderSource:
    """The images of the command line; prints which label is which folder, and what is left out."""
    from sdit.data.folders import continued, folder_of_tree
    from sdit.data.image_file import Reading
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
