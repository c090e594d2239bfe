"""What a rank knows about itself without torch: its host, versions, room and name."""

from __future__ import annotations

import os
import platform
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdit
from sdit.files import free_bytes
from sdit.launch_environment import RankInfo

PACKAGES = ("torch", "deepspeed", "fairscale", "mpi4py", "numpy", "safetensors", "webdataset")
SHM = Path("/dev/shm")


def local_facts(info: RankInfo, run_dir: Path) -> dict[str, Any]:
    """Return what a rank knows about itself without torch, as JSON types."""
    folder = nearest_folder(run_dir)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "found_by": info.source,
        "local_rank": info.local_rank,
        "versions": {"python": platform.python_version(), "sdit": sdit.__version__, **_package_versions()},
        "cores": len(os.sched_getaffinity(0)),
        "folder": str(folder),
        "disk_free_bytes": free_bytes(folder),
        "folder_problem": _write_problem(folder),
        "shm_free_bytes": free_bytes(SHM) if SHM.is_dir() else 0,
        "loopback_name": _resolves_to_loopback(),
    }


def _package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _write_problem(folder: Path) -> str:
    """Why no file can be written in the folder; empty if one can."""
    try:
        durable_write_seconds(folder, b"0" * 4096)
    except OSError as error:
        return str(error.strerror)
    return ""


def durable_write_seconds(folder: Path, data: bytes) -> float:
    """Return the seconds of a durable write into the folder. The file is removed. Raises: OSError: if it cannot be written."""
    probe = folder / f".sdit-doctor-{socket.gethostname()}-{os.getpid()}"
    started = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - started
    finally:
        probe.unlink(missing_ok=True)


def _resolves_to_loopback() -> bool:
    """Whether this host's own name leads to 127.x, which gloo would then announce to the other hosts."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False
