"""`sdit VERB ...`: each verb is a module of this package with a function `main(arguments) -> exit status`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from sdit import __version__
from sdit.cli.process import run_command
from sdit.errors import ExitCode

VERBS = {  # verb, which is the name of a module here -> what it does
    "train": "train a run, or resume it",
    "sample": "draw images from a run or a published checkpoint",
    "prepare": "write training images or latents as verified shards",
    "evaluate": "score a run's images, or a file of images, against a data set",
    "export": "write a run's weights as one file in published names",
    "ema": "write the average of a run's weights for any width",
    "routing": "draw which experts the denoising tasks or the tokens take",
    "report": "write one HTML page about a run, or several side by side",
    "doctor": "check a launch: ranks, hosts, versions, disk space, network",
    "plan": "estimate what a run needs before it starts, and whether it fits",
    "submit": "freeze config and commit, and submit the run to SLURM",
    "demo": "check a trained run of the digits",
    "config": "list, print or copy the configs that come with sdit",
}


def run(arguments: Sequence[str]) -> int:
    """Run a verb and return its exit status."""
    verb, *rest = list(arguments) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_manual())
        return ExitCode.DONE
    if verb == "--version":
        print(f"sdit {__version__}")
        return ExitCode.DONE
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"legal: {', '.join(VERBS)}"
        print(f"error: {verb}: unknown verb; {hint}", file=sys.stderr)
        return ExitCode.USAGE
    return int(importlib.import_module(f"{__name__}.{verb}").main(rest))  # only this verb: the others cost time


def _manual() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(["usage: sdit VERB ...", "", *lines, "", "sdit VERB --help is the manual of each."])


def main() -> None:
    """Run the installed command."""
    run_command(lambda: run(sys.argv[1:]))
