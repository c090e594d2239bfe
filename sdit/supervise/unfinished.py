"""RUN/unfinished.json exists while a run is not complete. It contains the end of the last launch.

Launchers hide the end of a run: `deepspeed` returns 0 if its child is killed. A launch writes the file when it begins,
adds the reason when it ends, and removes it when the run is complete.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sdit.files import read_json, write_json
from sdit.supervise.lock import HEARTBEAT_SECONDS, Holder, owner_of
from sdit.supervise.restart_policy import REFUSED

NAME = "unfinished.json"
SILENT_SECONDS = 12 * HEARTBEAT_SECONDS  # the holder of an older lock of another machine is dead
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LastLaunch:
    """The end of the last launch of an incomplete run. `code` is None if it wrote no reason."""

    token: str
    started: str
    steps: int | None = None
    step: int | None = None
    code: int | None = None
    why: str = ""

    def describe(self, run_dir: Path) -> str:
        """Return one sentence for a user."""
        if self.code is None:
            newest = max((path.name for path in (run_dir / "checkpoints").glob("images-*")), default="")
            where = f"newest checkpoint {newest}" if newest else "no checkpoint"
            what = f"{where}, all its processes were killed"
        else:
            of = f" of {self.steps}" if self.steps else ""
            position = f"step {self.step}{of}, " if self.step is not None else ""
            what = f"{position}{self.why} (exit {self.code})"
        return f"the last launch ended before the run was complete: {what}"


def last_launch(run_dir: Path) -> LastLaunch | None:
    """Return the end of the last launch, or None if the run is complete, was never started, or is running."""
    found = _read(run_dir)
    if found is not None and found.code is None:
        holder = owner_of(run_dir)
        if holder is not None and holder.body["token"] == found.token and _may_run(run_dir, holder):
            return None
    return found


def _may_run(run_dir: Path, holder: Holder) -> bool:
    """Return True if the lock's holder seems alive."""
    if holder.is_here:
        return holder.is_running
    try:
        return time.time() - (run_dir / "lock.json").stat().st_mtime < SILENT_SECONDS
    except OSError:
        return False


def _read(run_dir: Path) -> LastLaunch | None:
    try:
        return LastLaunch(**(read_json(run_dir / NAME) or {}))
    except TypeError:  # no file, or one of another version
        return None


class Unfinished:
    """The file, written by the launch that holds the run's lock. If the disk is full, the reason is lost."""

    def __init__(self, run_dir: Path, token: str, steps: int | None) -> None:
        """Log the end of the previous launch and write that this one has begun."""
        self._run_dir, self._before = run_dir, _read(run_dir)
        self._mine = LastLaunch(token, datetime.now(UTC).isoformat(timespec="seconds"), steps)
        if self._before is not None:
            _log.warning("%s", self._before.describe(run_dir))
        self._write(self._mine)

    def end(self, code: int, why: str, step: int | None = None) -> None:
        """Write the reason why the launch ended before the run was complete. A refused launch does not change the file."""
        if code not in REFUSED:  # a refused launch did not touch the run
            self._write(replace(self._mine, code=int(code), why=why, step=step))
        elif self._before is not None:
            self._write(self._before)
        else:
            clear(self._run_dir)

    def _write(self, launch: LastLaunch) -> None:
        try:
            write_json(self._run_dir / NAME, asdict(launch))
        except OSError as error:
            _log.warning("%s: %s", NAME, error)


def clear(run_dir: Path) -> None:
    """Remove the file, because the run is complete."""
    try:
        (run_dir / NAME).unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s: %s", NAME, error)
