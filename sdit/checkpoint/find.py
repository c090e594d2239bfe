"""Finds the checkpoints of a run on disk and verifies them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdit.checkpoint.files import manifest_shards, read_manifest, verify_shard
from sdit.checkpoint.shard_set import index_of
from sdit.errors import CheckpointError

_NAME = re.compile(r"images-(\d{12})")
_ASIDE = re.compile(r"aside-images-(\d{12})")


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: its folder, its manifest, and the reasons why newer ones were skipped."""

    folder: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a `checkpoints` folder, newest first. Checksums are not verified here."""
    return _folders(folder, _NAME)


def list_aside(folder: Path) -> list[Path]:
    """Return the checkpoints that `begin` set aside, the last one first."""
    return sorted(_folders(folder, _ASIDE), key=_modified, reverse=True)


def _folders(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir()), reverse=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed in the meantime
        return 0.0


def find_checkpoint(path: Path) -> Found:
    """Return the newest verified checkpoint of a run folder, or verify a checkpoint folder. Only for single processes.

    Raises: CheckpointError: if there is no checkpoint, or none verifies.
    """
    if (path / "manifest.json").exists() or _NAME.fullmatch(path.name):
        return Found(path, _verified(path))
    candidates = list_checkpoints(path / "checkpoints")
    skipped: list[str] = []
    for candidate in candidates:
        try:
            return Found(candidate, _verified(candidate), tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    detail = f" ({'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(f"{path}: holds no checkpoint{detail}; legal: a run folder or a checkpoint folder")


def read_checked(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises: CheckpointError: if it cannot be read, or its number of images differs from the folder's name.
    """
    manifest, name = read_manifest(folder), _NAME.fullmatch(folder.name)
    images_seen = manifest["clock"]["images_seen"]
    if name is not None and int(name[1]) != images_seen:
        legal = f"the name images-{images_seen:012d}"
        raise CheckpointError(f"{folder}: its manifest is of {images_seen} images; legal: {legal}")
    return manifest


def _verified(folder: Path) -> dict[str, Any]:
    manifest = read_checked(folder)
    verify_share(folder, manifest, 0, 1)
    return manifest


def verify_share(folder: Path, manifest: Mapping[str, Any], rank: int, world: int) -> None:
    """Verify a rank's share of the shards. Raises: CheckpointError: if one is damaged, or the index is not legal."""
    index = None if manifest.get("index") is None else index_of(folder, manifest)
    for number, record in list(enumerate(manifest_shards(manifest)))[rank::world]:
        verify_shard(folder, record, None if index is None else index.table_of(number))
