"""What the launchers share: mistakes become one line and an exit status that schedulers understand."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from sdit.errors import CheckpointError, ConfigError, ExitCode, SditError
from sdit.redact import redact
from sdit.textfile import text_problem

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
RANK = re.compile(r"\d{1,9}")
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.ASCII | re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks and whose errors take one line.

    Positional arguments may stand before, between and after options. Words are taken literally; those with control characters
    are refused.
    """

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=layout, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if problem := text_problem(word):
                self.error(f"{word!r}: {problem}; legal: printable text")
        words = self._with_deepspeed_file(words)
        parse = self.parse_known_args if self._subparsers is not None else self.parse_known_intermixed_args
        options, unknown = parse(words, namespace)
        if unknown:
            self.error(self._describe_unknown(unknown[0]))
        found: argparse.Namespace = options
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, redact(f"error: {message}; see {self.prog} --help\n"))

    def _with_deepspeed_file(self, words: list[str]) -> list[str]:
        """Write `--deepspeed FILE` and `--deepspeed` as one word each, so that it takes no override for a file."""
        if "--deepspeed" not in self._option_string_actions:
            return words
        end = words.index("--") if "--" in words else len(words)
        found: list[str] = []
        rest = iter(enumerate(words[:end]))
        for number, word in rest:
            following = words[number + 1] if number + 1 < end else ""
            if word == "--deepspeed" and following and not following.startswith("-") and not OVERRIDE.match(following):
                next(rest)
                word = f"--deepspeed={following}"
            found.append("--deepspeed=" if word == "--deepspeed" else word)
        return found + words[end:]

    def _describe_unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"{name}: is one argument too many"
        if OVERRIDE.fullmatch(f"{name.lstrip('-')}=") and "." in name:
            return f"{name}: unknown option; an override is written without dashes: {name.lstrip('-')}=VALUE"
        near = difflib.get_close_matches(name.replace("_", "-"), sorted(self._known_options()), n=1)
        return f"{name}: unknown option" + (f"; did you mean {near[0]}?" if near else "")

    def _known_options(self) -> set[str]:
        below = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in below for parser in choices.values())]
        return {name for parser in parsers for name in parser._option_string_actions}


class _DeepSpeedJson(argparse.Action):
    """Collects the names under which a DeepSpeed JSON was given, with the files; `--deepspeed` may come without one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        if values:
            if given and os.path.realpath(given) != os.path.realpath(values):
                parser.error(f"{option_string} {values} and {given} are two DeepSpeed JSONs; give one")
            setattr(namespace, self.dest, values)


def add_deepspeed_options(parser: Parser, text: str) -> None:
    """Add the DeepSpeed JSON as `ds_config` (None if not given), under its own name and DeepSpeed's names."""
    names = ("--ds_config", "--deepspeed_config", "--deepscale_config")
    parser.add_argument(*names, action=_DeepSpeedJson, metavar="JSON", help=text)
    text = "as DeepSpeed's own scripts take it: the same JSON, or nothing, because DeepSpeed is always used"
    parser.add_argument("--deepspeed", action=_DeepSpeedJson, dest="ds_config", metavar="JSON", help=text)
    for name in ("--deepscale", "--deepspeed_mpi"):
        parser.add_argument(name, action="store_true", help="taken as DeepSpeed's own scripts take it; no effect")


def add_rank_option(add: Callable[..., Any]) -> None:
    """Add the option that `deepspeed` and `torch.distributed.launch` append to every command."""
    add("--local_rank", "--local-rank", type=int, default=0, help="set by launchers; ignored, the environment is read")


def positive_int(text: str) -> int:
    """An argument's type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; legal: 1 or more")
    return value


def exit_status(action: Callable[[], int]) -> int:
    """Run a launcher's work and return its exit status; what a user can mend is told in one line on stderr."""
    try:
        return int(action())
    except SditError as error:
        _tell(error, common=isinstance(error, ConfigError | CheckpointError))
        return int(error.exit_code)
    except OSError as error:
        if error.filename is None:  # no file of the user's: a broken connection, say
            raise
        _tell(f"{error.filename}: {error.strerror}", common=False)
        return int(ExitCode.IO)
    except KeyboardInterrupt:
        _tell("stopped", common=True)
        return int(ExitCode.REQUEUE)


@contextmanager
def progress_bar(unit: str, text: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with (done, all) that moves a bar on a terminal, and shows nothing elsewhere."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=text, unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _tell(message: object, common: bool) -> None:
    """Print an error; what all ranks meet in `common` is told by the first alone."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    if rank == "0" or not RANK.fullmatch(rank):  # a rank that is no number is itself the mistake
        print(redact(f"error: {message}"), file=sys.stderr)
    elif not common:
        print(redact(f"error: rank {rank}: {message}"), file=sys.stderr)
