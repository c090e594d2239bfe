"""What the launchers share: mistakes become one line and an exit status that schedulers understand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sdit.errors import CheckpointError, ConfigError, ExitCode, SditError

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps its line breaks and whose errors take one line."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"error: {message}; see {self.prog} --help\n")


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
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif not common:
        print(f"error: rank {rank}: {message}", file=sys.stderr)
