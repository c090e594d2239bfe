"""A command as a process: its exit status, its errors in one line each, its progress bar, and its end."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sdit.errors import ConfigError, ExitCode, SditError, StorageError
from sdit.output import keep_output, output_problem
from sdit.redact import redact

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
RANK = re.compile(r"\d{1,9}")


def run_command(action: Callable[[], int]) -> NoReturn:
    """Run a command as this process and leave with its exit status."""
    leave(status_of(action))


def status_of(action: Callable[[], int]) -> int:
    """Run a command and return its exit status, with all of its output written.

    An unexpected error is printed with its traceback, and the status is 70, as for a rank that a supervisor watches. If the
    reader of the output leaves early (`| head`), the status does not change. If standard output cannot be written, the
    status is 74.
    """
    keep_output()
    try:
        code = int(action())
    except SystemExit as end:  # argparse ends a command like this after --help
        if end.code not in (None, ExitCode.DONE):
            raise
        code = ExitCode.DONE
    except Exception:
        traceback.print_exc()
        code = ExitCode.CRASH
    sys.stdout.flush()
    problem = output_problem()
    if problem and code == ExitCode.DONE:
        print(f"error: standard output: {problem}; its text is not complete", file=sys.stderr)
        code = ExitCode.IO
    sys.stderr.flush()
    return code


def leave(code: int) -> NoReturn:
    """End this process, which has closed all that it opened, without the interpreter's own shutdown.

    During that shutdown, threads of the libraries may wait for ranks that are gone, and gloo's may abort the process
    ("terminate called without an active exception", pytorch issue 190489): a run that is done would count as crashed.
    Only MPI needs the shutdown, for its own finalize.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "mpi4py.MPI" in sys.modules and code != ExitCode.REQUEUE:
        sys.exit(code)
    os._exit(code)


def command(
    parse: Callable[[list[str] | None], argparse.Namespace], run: Callable[[argparse.Namespace], int]
) -> Callable[..., int]:
    """Return the `main` of a command: it parses the arguments (None: those of the process), runs, and returns the exit status."""

    def main(arguments: list[str] | None = None) -> int:
        options = parse(arguments)
        return exit_status(lambda: run(options))

    return main


def exit_status(action: Callable[[], int]) -> int:
    """Run a command's work and return its exit status. An error that a user can fix is printed as one line on stderr."""
    try:
        return int(action())
    except SditError as error:
        _print_error(error, is_common=isinstance(error, ConfigError | StorageError))
        return int(error.exit_code)
    except OSError as error:
        if error.filename is None:  # not a file of the user's: a broken connection, for example
            raise
        _print_error(f"{error.filename}: {error.strerror}", is_common=False)
        return int(ExitCode.IO)
    except KeyboardInterrupt:
        _print_error("stopped", is_common=True)
        return int(ExitCode.REQUEUE)


def _print_error(message: object, is_common: bool) -> None:
    """Print an error. Only rank 0 prints an error that is common to all ranks."""
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")
    if rank == "0" or not RANK.fullmatch(rank):  # a rank that is not a number is the mistake itself
        print(redact(f"error: {message}"), file=sys.stderr)
    elif not is_common:
        print(redact(f"error: rank {rank}: {message}"), file=sys.stderr)


@contextmanager
def progress_bar(unit: str, text: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total). It moves a bar on a terminal and shows nothing elsewhere."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(desc=text, unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
