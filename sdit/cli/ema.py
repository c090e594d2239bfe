"""Write the average of a run's weights for any relative width, reconstructed from its stored power-function averages.

  sdit ema runs/in256 --sigma-rel 0.1
  sdit ema runs/in256 --sigma-rel 0.075 --images 20000000 --out narrow.safetensors

The run needs ema.sigma_rel (two widths are best) and ema.snapshot_images. The file is read like one of `sdit export`: by
`sdit sample --checkpoint FILE`, `sdit evaluate` and train.init_from. Source: Karras et al. 2024 (EDM2), section 3.2.
Exit status: 0 done, 64 wrong command line, 74 unreadable run or unwritable file, 78 impossible setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdit.cli.parser import Parser
from sdit.cli.process import command, progress_bar
from sdit.errors import ConfigError, ExitCode


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("ema", __doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    width_help = "relative width of the average, such as 0.1"
    add("--sigma-rel", type=float, required=True, metavar="WIDTH", help=width_help)
    images_help = "images seen at the end of the average (default: the newest stored)"
    add("--images", type=int, metavar="N", help=images_help)
    add("--out", type=Path, metavar="FILE", help="file to write (default: RUN/ema-sigma-WIDTH.safetensors)")
    options = parser.parse_args(arguments)
    if options.images is not None and options.images < 1:
        parser.error(f"--images: {options.images} is not legal; legal: 1 or more")
    parser.check_suffixes(options, out=".safetensors")
    return options


def run(options: argparse.Namespace) -> int:
    from sdit.config import MAX_SIGMA_REL  # not for --help: it takes half a second

    if not 0 < options.sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(f"--sigma-rel: {options.sigma_rel} is not legal; legal: above 0, below {MAX_SIGMA_REL:.4f}")
    from sdit.checkpoint.reconstruct import export_average
    from sdit.checkpoint.snapshots import choose_coefficients, find_averages

    averages = find_averages(options.run)
    newest = averages[-1].images
    images = newest if options.images is None else options.images
    if images > newest:
        raise ConfigError(f"--images: {images} is after the newest stored average; legal: at most {newest}")
    terms = choose_coefficients(averages, options.sigma_rel, images)
    out = options.out or options.run / f"ema-sigma-{options.sigma_rel!r}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("B", "combined") as show:
        export_average(terms, images, out, show)
    print(f"{out}: sigma_rel {options.sigma_rel:g} at {images} images, from {len(terms)} stored averages")
    return ExitCode.DONE


main = command(parse, run)
