"""The lock of a run directory: a file with host, pid and a heartbeat. It allows one writer and compares no clocks.

The file is created with its whole content (a hard link is exclusive), so it is never empty. Only one process may replace
the lock of a dead holder: the one that holds a second lock file, named after the first one's content. If several
processes start at the same time, one gets the lock and the others are refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdit.errors import ConfigError
from sdit.files import read_json, write_json
from sdit.supervise.process import identity, is_running, machine
from sdit.supervise.run_folder import unwritable

HEARTBEAT_SECONDS = 5.0
# A remote holder without a heartbeat for this long is dead. These are four heartbeats, for slow file systems.
WATCH_SECONDS = 20.0
HEAL_SECONDS = HEARTBEAT_SECONDS + 1.0  # by then a live holder has replaced content that was damaged
LOCK_BYTES = 65_536  # limit of a read; a lock has a few hundred bytes
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_log = logging.getLogger(__name__)


class RunLock:
    """Holds RUN/lock.json. `token` is the unguessable id of this launch.

    Raises:
        ConfigError: if a live process holds the lock. Nothing else was written then. The message names host and pid.
        StorageError: if the disk is full.
    """

    def __init__(
        self, run_dir: Path, watch_seconds: float = WATCH_SECONDS, launch: Mapping[str, str] | None = None
    ) -> None:
        self._path = run_dir / "lock.json"
        self.token = uuid.uuid4().hex
        self._body = {**identity(os.getpid()), "token": self.token, "beats": 0, "launch": dict(launch or {})}
        self._published_at = time.monotonic()
        self._ended = threading.Event()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _acquire(self._path, self._body, watch_seconds)
        except OSError as error:
            raise unwritable(run_dir, error) from error

    @property
    def is_held(self) -> bool:
        """True if the file still holds this launch's token."""
        body = read_json(self._path)
        return body is None or body.get("token") == self.token

    def beat(self) -> bool:
        """Update the heartbeat every `HEARTBEAT_SECONDS`. The caller calls it more often.

        Return False if another launch took the lock.
        """
        if time.monotonic() - self._published_at < HEARTBEAT_SECONDS:
            return True
        self._published_at = time.monotonic()
        if not self.is_held:
            return False
        self._body["beats"] += 1
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_json(self._path, self._body)
        return True

    def follow(self, run_dir: Path) -> None:
        """Use another path to the same folder, one that stays valid after a rename."""
        self._path = run_dir / self._path.name

    def keep_beating(self) -> None:
        """Update the heartbeat from a thread, for a process without a loop."""

        def beat() -> None:
            while not self._ended.wait(HEARTBEAT_SECONDS / 2):
                self.beat()

        threading.Thread(target=beat, name="sdit-lock", daemon=True).start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.is_held:
            with contextlib.suppress(OSError):
                self._path.unlink()


@dataclass(frozen=True)
class Holder:
    """The content of a lock file. `body` is empty if it is damaged. `stamp` changes with the file."""

    body: dict[str, Any]
    stamp: str

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return the content of the file, or None if there is no file.

        Raises: ConfigError: if the path is not a readable regular file.
        """
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                legal = "remove it, so that a lock file can be created"
                raise ConfigError(f"run_dir: {path}: is not a regular file; legal: {legal}")
            with path.open("rb") as file:
                data = file.read(LOCK_BYTES)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            legal = "a lock file that this user can read"
            raise ConfigError(f"run_dir: {path}: cannot be read ({error.strerror}); legal: {legal}") from error
        seed = f"{path.name} {status.st_ino} {status.st_mtime_ns} ".encode() + data
        return cls(_object(data), hashlib.sha256(seed).hexdigest()[:16])

    @property
    def is_damaged(self) -> bool:
        return not self.body

    @property
    def is_here(self) -> bool:
        """True if the holder is, or was, a process of this machine."""
        return bool(self.body) and self.body.get("machine") == machine()

    @property
    def is_running(self) -> bool:
        """True if the holder, a process of this machine, still runs."""
        return is_running(self.body["pid"], self.body.get("started"))

    def describe(self) -> str:
        """Return `process 7 on host n17`."""
        return f"process {self.body.get('pid')} on host {self.body.get('host')}"


def _object(data: bytes) -> dict[str, Any]:
    """Return the body of a lock, or an empty dict if the data are not one."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    is_lock = isinstance(body, dict) and isinstance(body.get("token"), str) and isinstance(body.get("pid"), int)
    return body if is_lock else {}


def _acquire(path: Path, body: dict[str, Any], watch_seconds: float) -> None:
    """Write `body` to the file. Only one process at a time can do so.

    Raises: ConfigError: if a live process holds the lock.
    """
    while not _create(path, body):
        holder = Holder.read(path)
        if holder is None:
            continue  # it was released in the meantime
        if _is_live(path, holder, watch_seconds):
            raise in_use(path.parent, Holder.read(path) or holder)
        right = path.with_name(f".lock.{holder.stamp}")  # the holder of this lock file may replace the other one
        _acquire(right, body, watch_seconds)
        try:
            now = Holder.read(path)
            if now is not None and now.stamp == holder.stamp:
                write_json(path, body)
                what = "damaged lock" if holder.is_damaged else f"lock of {holder.describe()}"
                _log.warning("took over the %s, which has ended", what)
                return
        finally:
            with contextlib.suppress(OSError):
                right.unlink()


def _create(path: Path, body: dict[str, Any]) -> bool:
    """Create the file with its whole content. Return False if it exists."""
    temporary = path.with_name(f".lock.{body['token']}.tmp")
    temporary.write_text(json.dumps(body) + "\n", encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # NFS repeats a request whose answer was lost
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_without_links(path, body)
    finally:
        temporary.unlink()
    return True


def _create_without_links(path: Path, body: dict[str, Any]) -> bool:
    """Create the file on a file system without hard links. Return False if it exists.

    Other processes may see the file empty for an instant.
    """
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(body, file)
    return True


def owner_of(run_dir: Path) -> Holder | None:
    """Return the holder of the run's lock, or None if there is none or the file cannot be read."""
    try:
        holder = Holder.read(run_dir / "lock.json")
    except (ConfigError, OSError):
        return None
    return None if holder is None or holder.is_damaged else holder


def in_use(run_dir: Path, holder: Holder) -> ConfigError:
    """Return the error for a run directory that another launch uses."""
    legal = "another run_dir, or end that process first"
    return ConfigError(f"run_dir: {run_dir}: is in use by {holder.describe()}; legal: {legal}")


def _is_live(path: Path, holder: Holder, watch_seconds: float) -> bool:
    """Return True if the holder is alive.

    On this machine the process table gives the answer at once. On another machine a live holder changes its file.
    """
    if holder.is_here:
        return holder.is_running
    deadline = time.monotonic() + (min(HEAL_SECONDS, watch_seconds) if holder.is_damaged else watch_seconds)
    while time.monotonic() < deadline:
        time.sleep(min(0.5, watch_seconds / 10))
        now = Holder.read(path)
        if now is None:
            return False
        if now.stamp != holder.stamp and not now.is_damaged:
            return not now.is_here or now.is_running
    return False
