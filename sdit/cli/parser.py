"""The argument parser of all commands, and the options that several of them share."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sdit.cli.presets import DEFAULT_DEEPSPEED, config_file, deepspeed_file
from sdit.errors import ExitCode
from sdit.redact import redact
from sdit.textfile import text_problem

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.ASCII | re.DOTALL)
MOST = 100_000_000


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

    def check_suffixes(self, options: argparse.Namespace, **suffixes: str) -> None:
        """End with a usage error if the file of an option has another suffix than the one given for the option."""
        for name, suffix in suffixes.items():
            path = getattr(options, name)
            if path is not None and path.suffix != suffix:
                self.error(f"--{name.replace('_', '-')}: {path} does not end in {suffix}")

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
    """Stores the DeepSpeed JSON that was given under any of its names. `--deepspeed` may come without a file."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        if values:
            if given and os.path.realpath(given) != os.path.realpath(values):
                parser.error(f"{option_string} {values} and {given} are two DeepSpeed JSONs; give one")
            setattr(namespace, self.dest, values)


def add_deepspeed_options(parser: Parser, text: str) -> None:
    """Add the DeepSpeed JSON as `ds_config` (a path; None if not given), under its own name and DeepSpeed's names."""
    add = parser.add_argument
    names = ("--ds_config", "--deepspeed_config", "--deepscale_config")
    text += f"; a path or a preset (default: {DEFAULT_DEEPSPEED})"
    add(*names, action=_DeepSpeedJson, type=deepspeed_file, metavar="JSON", help=text)
    text = "as DeepSpeed's own scripts accept it: the same JSON, or nothing, because DeepSpeed is always used"
    add("--deepspeed", action=_DeepSpeedJson, type=deepspeed_file, dest="ds_config", metavar="JSON", help=text)
    for name in ("--deepscale", "--deepspeed_mpi"):
        add(name, action="store_true", help="accepted as DeepSpeed's own scripts accept it; no effect")


def add_config_option(add: Callable[..., Any], text: str, default: str | None = None) -> None:
    """Add `--config` (the path of a YAML config), given as a path or as a preset's name; None without a default."""
    text += "; a path or a preset" + (f" (default: {default})" if default else "")
    add("--config", type=config_file, default=default, metavar="YAML", help=text)


def add_trained_options(add: Callable[..., Any]) -> None:
    """Add `--config` and `--weights`, which say how a checkpoint is read."""
    add_config_option(add, "config of a published file that does not carry its own")
    add_weights_option(add)


def add_weights_option(add: Callable[..., Any]) -> None:
    """Add `--weights`, which says which weights of a checkpoint are read."""
    text = "averaged or last weights, or another average of the run, such as ema-0.999 or ema-sigma-0.1 (default: ema)"
    add("--weights", type=weights_name, default="ema", metavar="NAME", help=text)


def add_rank_option(add: Callable[..., Any]) -> None:
    """Add the option that `deepspeed` and `torch.distributed.launch` append to every command."""
    add("--local_rank", "--local-rank", type=int, default=0, help="set by launchers; ignored, the environment is read")


def weights_name(text: str) -> str:
    """An argument's type: return the name of weights as checkpoints store them."""
    if not re.fullmatch(r"weight|ema(-(sigma-)?\d[\d.e+-]*)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: ema, weight, ema-DECAY, ema-sigma-WIDTH")
    return text


def positive_number(text: str) -> float:
    """An argument's type: return a finite number above 0."""
    return number(text, "a number above 0", lambda value: value > 0)


def number(text: str, legal: str, is_legal: Callable[[float], bool]) -> float:
    """Return the finite number of an argument.

    Raises: argparse.ArgumentTypeError: if it is no such number. The message says what is `legal`.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_legal(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not legal; legal: {legal}")
    return value


def positive_int(text: str) -> int:
    """An argument's type: return a whole number from 1 to `MOST`, so that no list of so many numbers fills the memory."""
    value = int(text)
    if not 1 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not legal; legal: 1 to {MOST}")
    return value
