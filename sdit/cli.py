"""`sdit VERB ...`: the launchers under one name."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sdit import __version__
from sdit.errors import ExitCode
from sdit.output import keep_output, output_problem

VERBS = {  # verb, which is the name of a module in launcher/ -> what it does
    "train": "train a run, or go on with it",
    "sample": "draw images from a run or a published checkpoint",
    "prepare": "write training images or latents as verified shards",
    "evaluate": "score a run's images, or a file of images, against a data set",
    "export": "write a run's weights as one file in published names",
    "routing": "draw which experts the denoising tasks take",
    "report": "write one HTML page about a run, or several side by side",
    "doctor": "check a launch: ranks, hosts, versions, room, network",
    "plan": "say what a run will need before it starts, and whether it fits",
    "submit": "freeze config and commit, and submit the run to SLURM",
    "demo": "judge a trained run of the digits",
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
    return int(importlib.import_module(f"launcher.{verb}").main(rest))


def _manual() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(["usage: sdit VERB ...", "", *lines, "", "sdit VERB --help is the manual of each."])


def main() -> None:
    """The installed command."""
    run_command(lambda: run(sys.argv[1:]))


def run_command(action: Callable[[], int]) -> NoReturn:
    """Run a command as this process and leave with its exit status."""
    leave(status_of(action))


def status_of(action: Callable[[], int]) -> int:
    """Run a command and return its exit status, with all of its output written.

    A reader that leaves early (`| head`) changes nothing. Standard output that cannot be written is an error, 74.
    """
    keep_output()
    try:
        code = int(action())
    except SystemExit as end:  # argparse ends a command so after --help
        if end.code not in (None, ExitCode.DONE):
            raise
        code = ExitCode.DONE
    sys.stdout.flush()
    problem = output_problem()
    if problem and code == ExitCode.DONE:
        print(f"error: standard output: {problem}; its text is not complete", file=sys.stderr)
        code = ExitCode.IO
    sys.stderr.flush()
    return code


def leave(code: int) -> NoReturn:
    """End this process, in which all that is ours is closed, without the interpreter's own end.

    There threads of the libraries may hold the process up, waiting for ranks that are gone, and gloo's may abort it
    ("terminate called without an active exception", pytorch issue 190489): a run that is done would count as crashed.
    MPI alone wants to be seen off.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules and code != ExitCode.REQUEUE:
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    main()
