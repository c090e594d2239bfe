"""Write a trained run's weights for others: one file in published names, a folder for from_pretrained, or one for diffusers.

  sdit export --checkpoint runs/digits --out digits.safetensors
  sdit export --checkpoint runs/in256 --out model.safetensors --dtype bfloat16
  sdit export --checkpoint runs/digits --out digits.pt             for code that reads the published .pt checkpoints
  sdit export --checkpoint runs/digits --out digits --format safetensors     for DiffusionTransformer.from_pretrained
  sdit export --checkpoint runs/latent256 --out latent256 --format diffusers --vae VAE_FOLDER

A .safetensors file carries the run's config, so that `sdit sample --checkpoint FILE` needs nothing else; it is written
tensor by tensor, for any size of the model. A folder holds a model card (README.md) with data, recipe, scores and commit.
Exit status: 0 done, 64 wrong command line, 74 unreadable checkpoint or unwritable file, 78 impossible setting.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.cli.parser import Parser, add_weights_option
from sdit.cli.process import command, progress_bar
from sdit.errors import ExitCode

if TYPE_CHECKING:
    import torch

PUBLISHED_SUFFIXES = (".safetensors", ".pt", ".pth")
FORMATS = ("safetensors", "diffusers", "published")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("export", __doc__)
    add = parser.add_argument
    source_help = "run folder (its newest good checkpoint) or checkpoint folder"
    add("--checkpoint", type=Path, required=True, metavar="RUN", help=source_help)
    add("--out", type=Path, required=True, metavar="PATH", help="file (.safetensors, .pt, .pth), or new folder")
    format_help = (
        "safetensors: folder for from_pretrained, or a .safetensors file; diffusers: folder for its pipelines; "
        "published: file in published names (default: published)"
    )
    add("--format", choices=FORMATS, help=format_help)
    vae_help = "diffusers: the AutoencoderKL to copy into the folder (default: sample.vae, if it is a folder)"
    add("--vae", type=Path, metavar="FOLDER", help=vae_help)
    add_weights_option(add)
    dtype_help = "of the stored weights (default: float32)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=dtype_help)
    options = parser.parse_args(arguments)
    if problem := _problem(options):
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str:
    """Return why the options do not fit together, or an empty string."""
    suffix, out = options.out.suffix, options.out
    if options.format in (None, "published") and suffix not in PUBLISHED_SUFFIXES:
        folders = "" if options.format else ", or a folder with --format safetensors or diffusers"
        return f"--out: {out} does not end in .safetensors, .pt or .pth{folders}"
    if options.format == "safetensors" and suffix in (".pt", ".pth"):
        return f"--out: {out} with --format safetensors; legal: a folder, or a .safetensors file"
    if options.format == "diffusers" and suffix in PUBLISHED_SUFFIXES:
        return f"--out: {out} with --format diffusers; legal: a folder"
    if options.vae is not None and options.format != "diffusers":
        return f"--vae: {options.vae} with --format {options.format or 'published'}; legal: only with diffusers"
    return ""


def run(options: argparse.Namespace) -> int:
    import torch  # seconds to import: not for --help

    dtype = getattr(torch, options.dtype)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix in PUBLISHED_SUFFIXES and options.format != "diffusers":
        facts = _export_file(options, dtype)
    else:
        facts = _export_folder(options, dtype)
    files = [options.out] if options.out.is_file() else [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{options.out}: {facts['variant']}, {facts['weights']} after {facts['images_seen']} images, {size} bytes")
    return ExitCode.DONE


def _export_file(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, str]:
    from sdit.checkpoint.export import export_pickle, export_safetensors

    if options.out.suffix != ".safetensors":
        return export_pickle(options.checkpoint, options.out, options.weights, dtype)
    with progress_bar("B", "exported") as show:
        return export_safetensors(options.checkpoint, options.out, options.weights, dtype, show)


def _export_folder(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, str]:
    from sdit.checkpoint.export_folder import export_diffusers, export_pretrained

    if options.format == "safetensors":
        with progress_bar("B", "exported") as show:
            return export_pretrained(options.checkpoint, options.out, options.weights, dtype, show)
    facts, differences = export_diffusers(options.checkpoint, options.out, options.weights, dtype, options.vae)
    for text in differences:
        print(f"note: {text}", file=sys.stderr)
    return facts


main = command(parse, run)
