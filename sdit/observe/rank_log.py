"""RUN/logs/rank-000.log: the log of rank 0, and RUN/logs/node-HOST.log: that of the other ranks of a host.

Each line has time and rank. Warnings are also printed to stderr. Secrets are redacted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from sdit.launch_environment import RankInfo
from sdit.redact import redact
from sdit.supervise.log_files import append, log_path, mark_lines, open_to_append
from sdit.supervise.run_folder import RunFolder
from sdit.train.events import Observer


class RankLog(Observer):
    """Writes the log of the process from construction to `close()`.

    If the rank fails, its traceback is logged.
    """

    every_rank = True

    def __init__(self, run_dir: Path | RunFolder, info: RankInfo) -> None:
        self._handlers: list[logging.Handler] = [_Terminal(info.rank)]
        path = log_path(run_dir / "logs", info.rank, "log")
        try:
            path.parent.mkdir(exist_ok=True)
            self._handlers.append(_File(path, info.rank))
        except OSError as error:
            print(f"{path}: {error.strerror}; rank {info.rank} writes no log", file=sys.stderr)
        self._level = logging.getLogger("sdit").level
        logging.getLogger("sdit").setLevel(logging.INFO)
        self._attached = [(logging.getLogger(), handler) for handler in self._handlers]
        # Libraries that print their own records do not propagate them. Their records go only to the file.
        closed = [
            logger for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)) if not logger.propagate
        ]
        self._attached += [(logger, handler) for logger in closed for handler in self._handlers[1:]]
        for logger, handler in self._attached:
            logger.addHandler(handler)
        logging.getLogger(__name__).info("%s; process %d", info.describe(), os.getpid())

    def close(self) -> None:
        if sys.exc_info()[0] is not None:
            # The launcher prints one line to the terminal. The traceback goes only to the file.
            logging.getLogger().removeHandler(self._handlers[0])
            logging.getLogger(__name__).error("this rank failed", exc_info=True)
        for logger, handler in self._attached:
            logger.removeHandler(handler)
        for handler in self._handlers:
            handler.close()
        logging.getLogger("sdit").setLevel(self._level)


class _Lines(logging.Formatter):
    """Formats `2026-01-31T12:00:00Z rank 0 WARNING sdit.data.bad_samples: text`, in UTC so that ranks can be compared."""

    converter = staticmethod(time.gmtime)  # type: ignore[assignment]

    def __init__(self, rank: int) -> None:
        self._rank = rank
        super().__init__(f"%(asctime)sZ rank {rank} %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        first, *more = redact(super().format(record)).splitlines(keepends=True) or [""]
        return first + mark_lines("".join(more), self._rank)


class _File(logging.Handler):
    """A log file that several processes may append to. Each record is one write, so that lines are never mixed.

    A failed write, for example on a full disk, is reported once, and the run continues.
    """

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__()
        self._path, self._descriptor = path.absolute(), open_to_append(path)
        self.setFormatter(_Lines(rank))
        self._reported = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            append(self._descriptor, self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._reported:
            self._reported = True
            print(f"{self._path}: {sys.exc_info()[1]}; lines are lost", file=sys.stderr)

    def close(self) -> None:
        with self.lock or nullcontext():
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        super().close()


class _Terminal(logging.Handler):
    """Prints warnings to stderr, above the progress bar if there is one. All ranks but rank 0 add their rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._prefix = f"rank {rank}: " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self._prefix + redact(record.getMessage()), file=sys.stderr)
        except Exception:
            self.handleError(record)
