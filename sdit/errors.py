"""Errors for users and the process exit codes every launcher, SLURM script and manifest shares."""

from __future__ import annotations

import enum
import re

MESSAGE_CHARACTERS = 300
_CPP_TRACE = re.compile(r"\s*(Exception raised from|C\+\+ CapturedTraceback|frame #0:).*", re.DOTALL)


class ExitCode(enum.IntEnum):
    """Exit status of every sdit process; the scheduler decides on it whether to run the job again."""

    DONE = 0
    USAGE = 64  # wrong command line: never retry
    DATA = 65  # bad data or a diverged run: never retry
    CRASH = 70  # crash or hang: retry
    IO = 74  # file system or checkpoint could not be read or written: retry
    REQUEUE = 75  # stopped on request, checkpoint saved: retry
    CONFIG = 78  # impossible configuration: never retry


class SditError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = ExitCode.CRASH


class ConfigError(SditError):
    """A configuration that cannot run; the message names key, value and what is legal."""

    exit_code = ExitCode.CONFIG


class DataError(SditError):
    """Data that is missing, corrupt or of the wrong shape; the message names shard and key."""

    exit_code = ExitCode.DATA


class CheckpointError(SditError):
    """A checkpoint that cannot be read or written; the message names the file."""

    exit_code = ExitCode.IO


def one_line(text: str, characters: int = MESSAGE_CHARACTERS) -> str:
    """Return a message as one line of bounded length: no line breaks, control characters, or stack traces of C++ code."""
    text = _CPP_TRACE.sub("", text) or text
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= characters else text[: characters - 3].rstrip() + "..."
