"""Check a trained run of the digits: a sample grid, a routing map, and whether the samples are recognised.

  sdit train --run-dir runs/demo && sdit demo --run-dir runs/demo

Draws 20 digits of each class from the averaged weights, with the run's sampler and guidance, and shows them to a
classifier trained on half of the real digits. Writes RUN/demo/grid.png and RUN/demo/routing.png.
Exit status: 0 the samples are good, 64 wrong command line, 65 they are not, 74 unreadable checkpoint, 78 another model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.caches import run_caches, use_cache
from sdit.cli.parser import Parser, add_weights_option
from sdit.cli.process import command, progress_bar
from sdit.errors import ConfigError, DataError, ExitCode

if TYPE_CHECKING:
    import numpy as np

PER_CLASS = 20
COLUMNS = 8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("demo", __doc__)
    parser.add_argument("--run-dir", type=Path, required=True, metavar="RUN", help="folder of the run")
    add_weights_option(parser.add_argument)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    use_cache(run_caches(options.run_dir))
    import numpy as np  # slow imports: not for --help

    from sdit.checkpoint.load import load_trained
    from sdit.distributed.comm import find_rank, set_threads
    from sdit.evaluate.generate import Generator
    from sdit.model import solve_assignment
    from sdit.observe.routing import Snapshot
    from sdit.observe.routing_figures import draw_map
    from sdit.observe.sample_grids import save_grid

    set_threads(find_rank(os.environ), None)
    trained = load_trained(options.run_dir, options.weights)
    model = trained.config.model
    if (model.channels, model.input_size, model.classes) != (1, 8, 10):
        shape = f"{model.channels} x {model.input_size} x {model.input_size}, {model.classes} classes"
        raise ConfigError(
            f"model: {shape} is not a model of the digits; legal: 1 x 8 x 8, 10 classes, as in the preset digits"
        )
    folder = options.run_dir / "demo"
    folder.mkdir(exist_ok=True)
    labels = np.repeat(np.arange(10, dtype=np.int64), PER_CLASS)
    with progress_bar("step", f"{len(labels)} digits") as show:
        images = np.concatenate(list(Generator(trained, trained.config.sample).images(labels, progress=show)))
    shown = np.arange(len(labels)) % PER_CLASS < COLUMNS
    save_grid(folder / "grid.png", images[shown], COLUMNS)
    print(f"samples: {folder / 'grid.png'}")
    if model.variant == "switch":
        probs = trained.model.all_gate_probs()
        title = f"after {trained.clock.images_seen:,} images"
        snapshot = Snapshot.take(0, probs.numpy(), model.experts.top_k, solve_assignment(probs, model))
        draw_map(snapshot, folder / "routing.png", title)
        print(f"routing map: {folder / 'routing.png'}")
    return judge(options.run_dir, images, labels)


def judge(run_dir: Path, images: np.ndarray, labels: np.ndarray) -> int:
    """Compare samples (N, 1, 8, 8) with labels (N,) with the real digits, and print the result.

    Raises: DataError: if the samples are not good enough.
    """
    from sdit.evaluate.digits import SPREAD_BAND, WANTED_RECOGNISED, judge_digits

    report = judge_digits(images, labels)
    low, high = SPREAD_BAND
    print(f"digits recognised: {100 * report.recognised:.1f} % (wanted {100 * WANTED_RECOGNISED:.0f} %)")
    print(f"real digits the classifier had not seen: {100 * report.held_out:.1f} %")
    print(f"spread within a class over that of real digits: {report.spread:.2f} (wanted {low} to {high})")
    if not report.good:
        raise DataError(f"{run_dir}: the samples are not good enough; train longer, such as train.steps=4000")
    return ExitCode.DONE


main = command(parse, run)
