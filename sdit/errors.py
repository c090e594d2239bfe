"""Errors for users, and the process exit codes that all launchers, SLURM scripts and manifests share."""

from __future__ import annotations

import enum
import re

MESSAGE_CHARACTERS = 300
_CPP_TRACE = re.compile(r"\s*(Exception raised from|C\+\+ CapturedTraceback|frame #0:).*", re.DOTALL)


class ExitCode(enum.IntEnum):
    """The exit status of each sdit process. The scheduler uses it to decide about a retry."""

    DONE = 0
    USAGE = 64  # wrong command line: never retry
    DATA = 65  # bad data or a diverged run: never retry
    CRASH = 70  # crash or hang: retry
    IO = 74  # file system or checkpoint could not be read or written: retry
    REQUEUE = 75  # stopped on request, checkpoint saved: retry
    CONFIG = 78  # impossible configuration: never retry


class SditError(Exception):
    """Base class of all errors that are shown to the user as one line, without a traceback."""

    exit_code = ExitCode.CRASH


class ConfigError(SditError):
    """A configuration that cannot run. The message names key, value and the legal values."""

    exit_code = ExitCode.CONFIG


class DataError(SditError):
    """Data that are missing, corrupt or of the wrong shape. The message names shard and key."""

    exit_code = ExitCode.DATA


class StorageError(SditError):
    """Storage that cannot be used now, for example a full disk. The message names the path. A retry can succeed."""

    exit_code = ExitCode.IO


class CheckpointError(StorageError):
    """A checkpoint that cannot be read or written. The message names the file."""


def one_line(text: str, characters: int = MESSAGE_CHARACTERS) -> str:
    """Return a message as one line of limited length, without control characters and C++ stack traces."""
    text = _CPP_TRACE.sub("", text) or text
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= characters else text[: characters - 3].rstrip() + "..."
