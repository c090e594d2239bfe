"""Turns settings into a SLURM batch script that needs nothing from outside: pure functions of text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdit.errors import ConfigError

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:,/=+-]*")  # what an #SBATCH line holds without quotes
WORD_TEXT = "letters, digits and . _ : , / = + -"
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
OPTION = re.compile(r"[a-z][a-z-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Allocation:
    """What is asked of SLURM; None leaves a setting to the script or the cluster."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    array: str | None = None
    more: Sequence[str] = field(default_factory=tuple)

    def directives(self) -> dict[str, str | None]:
        """Return the options of sbatch, by their long names. Those without a value hold None.

        Raises: ConfigError: if SLURM would read a value as something else.
        """
        counts = {"nodes": self.nodes, "ntasks-per-node": self.ranks_per_node}
        if self.gpus_per_node:
            counts["gpus-per-node"] = self.gpus_per_node
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}: {count} is not legal; legal: a whole number from 1")
        found: dict[str, str | None] = {name: str(count) for name, count in counts.items()}
        checked = (("job-name", self.job_name, WORD, WORD_TEXT),
                   ("partition", self.partition, WORD, WORD_TEXT),
                   ("account", self.account, WORD, WORD_TEXT),
                   ("time", self.time, TIME, "minutes, hours:minutes:seconds or days-hours"),
                   ("array", self.array, ARRAY, "seeds such as 1-4, 1,5,7 or 1-8%2"))  # fmt: skip
        for name, value, legal, text in checked:
            if value is not None:
                found[name] = _matching(name, value, legal, text)
        for option in self.more:
            name, separator, value = option.removeprefix("--").partition("=")
            _matching("sbatch", name, OPTION, "options in their long form, such as constraint=a100")
            found[name] = _matching(f"sbatch {name}", value, WORD, WORD_TEXT) if separator else None
        return found


def render(
    template: str, directives: Mapping[str, str | None], variables: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """Return `template` with these `#SBATCH` options, variables and arguments of the training in place of its own.

    Options that the template has and `directives` does not are kept. All values are quoted for the shell.
    """
    for name in variables:
        _matching("set", name, VARIABLE, "NAME=VALUE with a name of letters, digits and _")
    head: list[str] = []
    body: list[str] = []
    kept: dict[str, str | None] = {}
    for line in template.splitlines():
        if line.startswith("#SBATCH --"):
            name, separator, value = line.removeprefix("#SBATCH --").partition("=")
            kept[name] = value if separator else None
        else:
            (body if kept else head).append(line)
    chosen = {**kept, **directives}
    options = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in chosen.items()]
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    given = ["set -- " + shlex.join(arguments)] if arguments else []
    return "\n".join([*head, *options, *settings, *given, *body]) + "\n"


def _matching(name: str, value: str, legal: re.Pattern[str], text: str) -> str:
    if not legal.fullmatch(value):
        raise ConfigError(f"{name}: {value!r} is not legal; legal: {text}")
    return value
