"""Checks that a file system has enough space for the checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

from sdit.errors import ConfigError

FILES_BESIDE_SHARDS = 16  # manifest, folder, latest, metrics, logs


def check_space(folder: Path, checkpoint_bytes: int, keep_last: int, files: int) -> None:
    """Check that the checkpoints that retention keeps fit, together with the one being written.

    A checkpoint has `files` files of shards. The space of existing and of set-aside checkpoints counts as free, because new
    checkpoints replace them.

    Raises: ConfigError: if they do not fit, or too few files can be created.
    """
    existing = sum(path.stat().st_size for path in folder.glob("*images-*/*"))
    needed = (keep_last + 1) * checkpoint_bytes - existing
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise ConfigError(
            f"run_dir: {folder}: {needed} bytes more are needed for checkpoint.keep_last {keep_last} checkpoints and "
            f"the one being written ({checkpoint_bytes} bytes each), {free} are free; legal: a larger file system"
        )
    if disk.f_files and disk.f_favail < files + FILES_BESIDE_SHARDS:
        raise ConfigError(
            f"run_dir: {folder}: only {disk.f_favail} more files can be created; legal: {files + FILES_BESIDE_SHARDS}"
        )
