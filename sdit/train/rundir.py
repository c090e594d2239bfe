"""A run is a directory; the same command continues it."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdit
from sdit.config import ResolvedRun, dump_config
from sdit.distributed.comm import Comm
from sdit.redact import holds_credential, redact
from sdit.supervise.run_folder import RunFolder, unwritable

PACKAGES = ("torch", "deepspeed", "fairscale", "webdataset", "numpy", "safetensors")
_log = logging.getLogger(__name__)


PLACES = (".", "checkpoints", "samples", "routing")
LEFTOVERS = (".*.tmp", ".partial-*", ".lock.*", ".writable.*")  # files that a killed process could not rename or remove
LEFTOVER_SECONDS = 3600.0  # a younger one may be in use by a process that looks at the run


def prepare_run_dir(folder: RunFolder) -> None:
    """Create the folders of a run, and remove old temporary files.

    Raises:
        ConfigError: if it cannot be written.
        StorageError: if the disk is full.
    """
    try:
        folder.make("checkpoints")
        folder.make("logs")
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
        _remove_leftovers(folder.path)
    except OSError as error:
        raise unwritable(folder.path, error) from error


def _remove_leftovers(path: Path) -> None:
    newest = time.time() - LEFTOVER_SECONDS
    for leftover in (found for place in PLACES for pattern in LEFTOVERS for found in (path / place).glob(pattern)):
        if leftover.is_file() and not leftover.is_symlink() and leftover.stat().st_mtime < newest:
            leftover.unlink(missing_ok=True)


def describe_run(path: Path, run: ResolvedRun, comm: Comm, facts: Mapping[str, Any]) -> None:
    """Write config.yaml, deepspeed.json and environment.json, as resolved for this attempt."""
    _warn_of_credential(path / "config.yaml")
    (path / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    (path / "deepspeed.json").write_text(json.dumps(run.deepspeed, indent=2) + "\n", encoding="utf-8")
    environment = {
        "sdit": sdit.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "ranks": comm.world,
        "ranks_found_by": comm.info.source,
        "device": str(comm.device),
        "command": [redact(word) for word in sys.argv],
        "micro_batch": run.batch.micro_batch,
        "accumulation": run.batch.accumulation,
        "expert_parallel": run.expert_parallel,
        **facts,
    }
    (path / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _warn_of_credential(old: Path) -> None:
    """Warn if the config.yaml of an earlier start holds a credential, as older versions wrote it."""
    try:
        text = old.read_text(encoding="utf-8")
    except (OSError, ValueError):  # there is none, or none that can be read; it is written anew
        return
    if any(holds_credential(line) for line in text.splitlines()):
        _log.warning(
            "%s held a credential and is replaced now; older checkpoints and logs of the run still hold it: "
            "change that password",
            old,
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return os.environ.get("SDIT_GIT_COMMIT", "unknown")  # set in images, which hold no repository
    return result.stdout.strip() or os.environ.get("SDIT_GIT_COMMIT", "unknown")
