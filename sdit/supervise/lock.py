"""One run directory, one writer: a lock file with host, pid and a heartbeat that does not trust any clock."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from sdit.errors import ConfigError
from sdit.supervise.files import read_json, write_json

BEAT_SECONDS = 5.0
WATCH_SECONDS = 20.0  # a holder elsewhere that does not beat for this long is dead; four beats, for slow file systems
_log = logging.getLogger(__name__)


class RunLock:
    """Holds RUN/lock.json. Raises: ConfigError, naming host and pid, when a live process holds it."""

    def __init__(self, run_dir: Path, watch_seconds: float = WATCH_SECONDS) -> None:
        self._path = run_dir / "lock.json"
        self._body: dict[str, Any] = {**identity(os.getpid()), "token": uuid.uuid4().hex, "beats": 0}
        self._beaten = time.monotonic()
        self._ended = threading.Event()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over(watch_seconds)
        except OSError as error:
            raise unwritable(run_dir, error) from error

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self._body, file)
        return True

    def _take_over(self, watch_seconds: float) -> None:
        """Move a dead holder's lock out of the way; the rename decides between two that try."""
        holder = _settled(self._path)
        if holder is not None and _is_live(self._path, holder, watch_seconds):
            raise ConfigError(
                f"run_dir: {self._path.parent}: is in use by process {holder.get('pid')} on host {holder.get('host')}; "
                "legal: another run_dir, or end that process first"
            )
        aside = self._path.with_name(f".lock.{self._body['token']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            moved = read_json(aside)
            if moved is not None and holder is not None and moved.get("token") != holder.get("token"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)  # somebody was quicker: that was their lock, not the dead one
            elif holder is not None:
                _log.warning(
                    "took over the lock of process %s on host %s: it is gone", holder.get("pid"), holder.get("host")
                )
            aside.unlink()

    @property
    def is_held(self) -> bool:
        """Whether the file still says that the run is ours."""
        body = read_json(self._path)
        return body is None or body.get("token") == self._body["token"]

    def beat(self) -> bool:
        """Show every `BEAT_SECONDS` that the holder lives; call it more often. False: the lock was taken away."""
        if time.monotonic() - self._beaten < BEAT_SECONDS:
            return True
        self._beaten = time.monotonic()
        if not self.is_held:
            return False
        self._body["beats"] += 1
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_json(self._path, self._body)
        return True

    def follow(self, run_dir: Path) -> None:
        """Use another path to the same folder: one that holds after a rename."""
        self._path = run_dir / self._path.name

    def keep_beating(self) -> None:
        """Beat from a thread, for a process without a loop of its own."""

        def beat() -> None:
            while not self._ended.wait(BEAT_SECONDS / 2):
                self.beat()

        threading.Thread(target=beat, name="sdit-lock", daemon=True).start()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.is_held:
            with contextlib.suppress(OSError):
                self._path.unlink()


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    """The error for a run directory that cannot be used."""
    return ConfigError(f"run_dir: {run_dir}: cannot be written ({error.strerror}); legal: a writable folder")


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from every other one, also from a later one with the same pid."""
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _start_ticks(pid),
        "machine": f"{_read('/proc/sys/kernel/random/boot_id')} {_namespace()}",
    }


def _is_live(path: Path, holder: dict[str, Any], watch_seconds: float) -> bool:
    """On this machine the process table answers at once; for others, whether the heartbeat moves while we look."""
    pid = holder.get("pid")
    here = identity(pid) if isinstance(pid, int) else {}
    if here.get("machine") == holder.get("machine"):
        return here["started"] is not None and here["started"] == holder.get("started")
    deadline = time.monotonic() + watch_seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, watch_seconds / 10))
        body = read_json(path)
        if body is None:
            return False
        if (body.get("token"), body.get("beats")) != (holder.get("token"), holder.get("beats")):
            return True
    return False


def _settled(path: Path) -> dict[str, Any] | None:
    """The lock's content; its creator may still be writing it."""
    for _ in range(10):
        body = read_json(path)
        if body is not None or not path.exists():
            return body
        time.sleep(0.05)
    return None


def _start_ticks(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only its corpse."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
