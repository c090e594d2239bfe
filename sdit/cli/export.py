"""Write a trained run's weights as one file in published names (DiT, DTR, Switch-DiT), to share or to sample elsewhere.

  sdit export --checkpoint runs/digits --out digits.safetensors
  sdit export --checkpoint runs/in256 --out model.safetensors --dtype bfloat16
  sdit export --checkpoint runs/digits --out digits.pt             for code that reads the published .pt checkpoints

A .safetensors file carries the run's config, so that `sdit sample --checkpoint FILE` needs nothing else; it is written
tensor by tensor, for any size of the model.
Exit status: 0 done, 64 wrong command line, 74 unreadable checkpoint or unwritable file, 78 impossible setting.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdit.cli.parser import Parser, add_weights_option
from sdit.cli.process import command
from sdit.cli.progress import progress_bar
from sdit.errors import ExitCode


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("export", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="run folder (its newest good checkpoint) or checkpoint folder",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="file to write: .safetensors, or .pt")
    add_weights_option(add)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the stored weights (default: float32)",
    )
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".safetensors", ".pt", ".pth"):
        parser.error(f"--out: {options.out} does not end in .safetensors, .pt or .pth")
    return options


def run(options: argparse.Namespace) -> int:
    import torch  # seconds to import: not for --help

    from sdit.checkpoint.export import export_pickle, export_safetensors

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[options.dtype]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix == ".safetensors":
        with progress_bar("B", "exported") as show:
            facts = export_safetensors(options.checkpoint, options.out, options.weights, dtype, show)
    else:
        facts = export_pickle(options.checkpoint, options.out, options.weights, dtype)
    size = options.out.stat().st_size
    print(f"{options.out}: {facts['variant']}, {facts['weights']} after {facts['images_seen']} images, {size} bytes")
    return ExitCode.DONE


main = command(parse, run)
