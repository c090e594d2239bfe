"""Processes that fork from a server which has imported torch, DeepSpeed and sdit: seconds of CPU less for each rank.

All of them have the server's hash seed. What tests the start of a process, or its memory, uses `subprocess`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

PRELOADED = "tests.distributed.preloaded"


def fork_script(
    script: Path, words: Sequence[str], environment: Mapping[str, str], log: Path, errors: Path | None = None
) -> ForkServerProcess:
    """Start `python script words` with this environment in the current folder.

    `log` receives its output. If `errors` is given, it receives what goes to stderr.
    """
    streams = (log, errors or log)
    process = _server().Process(
        target=_become, args=(str(script), list(words), dict(environment), os.getcwd(), streams)
    )
    process.start()
    return process


def run_script(
    script: Path, words: Sequence[object], environment: Mapping[str, str], log: Path, timeout_seconds: float = 120
) -> tuple[int | None, str]:
    """Exit status of `python script words`, None if it was ended at the time limit, and its output, which `log` receives."""
    process = fork_script(script, [str(word) for word in words], environment, log)
    process.join(timeout_seconds)
    status = process.exitcode
    process.kill()
    return status, log.read_text()


@functools.cache
def _server() -> ForkServerContext:
    """Start the server. It computes nothing, so it has a single thread, as a process that forks must."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _become(
    script: str, words: list[str], environment: dict[str, str], folder: str, streams: tuple[Path, Path]
) -> None:
    assert PRELOADED in sys.modules, "the server ignores an import that fails"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in enumerate(streams, start=1):
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, descriptor)
        os.close(output)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
