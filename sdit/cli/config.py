"""List, print or copy the configs, DeepSpeed JSONs and hardware files that come with sdit.

  sdit config list                            name and purpose of each
  sdit config show digits                     print it
  sdit config new digits --out mine.yaml      copy it to a file of your own, which never replaces another one

`sdit train --config NAME --ds_config NAME` finds them by name as well, and
`sdit plan --hardware NAME` hardware files.
Exit status: 0 done, 64 wrong command line, 74 file that cannot be written, 78 the file exists already.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdit.cli.parser import Parser
from sdit.cli.presets import CONFIGS, DEEPSPEED, HARDWARE, preset_file, presets
from sdit.cli.process import command
from sdit.errors import ConfigError, ExitCode


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("config", __doc__)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", parser_class=Parser
    )
    for name, text in (("list", "print the names"), ("show", "print a preset"), ("new", "copy a preset")):
        action = actions.add_parser(name, help=text, description=text)
        if name != "list":
            action.add_argument("preset", type=preset_file, metavar="NAME", help="see sdit config list")
        if name == "new":
            out_help = "file to write (default: NAME.yaml or NAME.json, here)"
            action.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Do what `options.action` says."""
    if options.action == "list":
        for title, pattern in (("--config", CONFIGS), ("--ds_config", DEEPSPEED), ("plan --hardware", HARDWARE)):
            print(f"{title}:")
            for name, file in presets(pattern).items():
                print(f"  {name:20}  {_purpose(file)}".rstrip())
    elif options.action == "show":
        print(options.preset.read_text(encoding="utf-8"), end="")
    else:
        target = options.out or Path(options.preset.name)
        _copy(options.preset, target)
        print(target)
    return ExitCode.DONE


def _purpose(file: Path) -> str:
    """Return the first sentence of the comment in the first line of a YAML file; empty for a JSON, which has none."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0] if first.startswith("#") else ""


def _copy(preset: Path, target: Path) -> None:
    """Copy a preset to a new file.

    Raises: ConfigError: if there is a file already.
    """
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(preset.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"--out: {target} exists already; legal: a file that does not exist") from None


main = command(parse, run)
