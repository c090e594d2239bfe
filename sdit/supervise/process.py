"""Processes of this machine. They are distinguished even if the kernel reuses a process id (Linux)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process of this machine: its id and its start time in clock ticks since boot."""

    pid: int
    started: str | None  # None if the system does not know

    def __str__(self) -> str:
        return f"{self.pid} {self.started}"

    @property
    def is_running(self) -> bool:
        return is_running(self.pid, self.started)


def identity(pid: int) -> dict[str, Any]:
    """Return the properties that identify a process, even if a later process has the same pid."""
    return {"host": socket.gethostname(), "pid": pid, "started": start_ticks(pid), "machine": machine()}


def machine() -> str:
    """Return the boot id and the process namespace of this process. Process ids are unique within them."""
    return f"{_read('/proc/sys/kernel/random/boot_id')} {_namespace()}"


def is_running(pid: int, started: object) -> bool:
    """Return True if the process with this start time runs on this machine. A zombie does not run."""
    if isinstance(pid, bool) or not 0 < pid < 2**31:
        return False
    alive = start_ticks(pid)
    if alive is not None:
        return alive == started
    if Path(f"/proc/{pid}").exists():
        return False  # a zombie
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # /proc hides the processes of other users
    except OSError:
        return False
    return started is None  # a system without /proc


def start_ticks(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot, or None if it does not exist or is a zombie."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def parent_of(pid: int) -> int:
    """Return the id of a process's parent, or 0 if there is none."""
    fields = _stat(pid)
    return int(fields[1]) if len(fields) > 1 else 0


def name_of(pid: int) -> str:
    """Return the kernel's name of a process, or an empty string if it cannot be read."""
    return _read(f"/proc/{pid}/comm")


def command_of(pid: int) -> list[str]:
    """Return the words of a process's command line, or an empty list if they cannot be read."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return data.decode(errors="replace").rstrip("\0").split("\0") if data else []


def _stat(pid: int) -> list[str]:
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
