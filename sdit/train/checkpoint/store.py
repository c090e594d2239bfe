"""The checkpoints of one run directory: written by all ranks, committed by one, found again by agreement."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.distributed.shards import Shard
from sdit.errors import CheckpointError
from sdit.expert_parallel.logical_tensors import ExpertIds, named_spans, spans_of
from sdit.train.checkpoint.files import (
    FORMAT,
    FileRecord,
    ShardSet,
    fsync,
    manifest_files,
    read_manifest,
    replace_text,
    verify_file,
    write_manifest,
    write_shard,
)

_log = logging.getLogger(__name__)
_NAME = re.compile(r"images-(\d{12})")


class DiskFullError(CheckpointError):
    """There was no room for a checkpoint; an old one has been removed if there were two."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: its folder, its manifest, and why newer ones were passed over."""

    folder: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a `checkpoints` folder, newest first; verified they are not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def find_checkpoint(path: Path) -> Found:
    """The newest verified checkpoint of a run folder, or the checkpoint folder itself. For single processes.

    Raises:
        CheckpointError: nothing there, or nothing that verifies.
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


def _verified(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    for record in manifest_files(manifest):
        verify_file(folder, record)
    return manifest


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of the state: flat float32 `tensors` by key, logical `shapes`, `facts` for the manifest.

    `is_live`: some tensors are views of the state, which the next step will change.
    """

    images_seen: int
    tensors: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Any]
    is_live: bool = True


class CheckpointStore:
    """Saves and finds the checkpoints under `folder`, together with the other ranks."""

    def __init__(self, folder: Path, config: CheckpointConfig, comm: Comm) -> None:
        self.folder, self._config, self._comm = folder, config, comm

    def folder_of(self, images_seen: int) -> Path:
        """Where the checkpoint of a moment lies once it is committed."""
        return self.folder / f"images-{images_seen:012d}"

    def begin(self, images_seen: int) -> None:
        """Rank 0, before the run goes on from `images_seen`: put aside what is not its past, and drop leftovers."""
        for leftover in self.folder.glob(".images-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for later in list_checkpoints(self.folder):
            if int(later.name.removeprefix("images-")) > images_seen:
                aside = self.folder / f"aside-{later.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(later, aside)
                _log.warning("%s: the run goes on from before it; it is now %s", later, aside.name)

    def save(self, snapshot: Snapshot) -> Path:
        """Write this rank's part, wait for all ranks, commit; return the new folder.

        The folder appears under its name only when every file of every rank is on storage.
        Raises: CheckpointError on every rank when any rank could not write; the previous checkpoint stays as it was.
        """
        try:
            return self._save(snapshot)
        except DiskFullError:
            return self._save(snapshot)  # there may be room now

    def _save(self, snapshot: Snapshot) -> Path:
        records: list[FileRecord] = []
        problem = self.write_part(snapshot, records)
        gathered = self.agree(problem, snapshot.images_seen, self.listed(records))
        problem = self.commit(snapshot, gathered) if self._comm.is_first else ""
        self.agree(problem, snapshot.images_seen)
        return self.folder_of(snapshot.images_seen)

    def write_part(self, snapshot: Snapshot, records: list[FileRecord]) -> str:
        """Write and fsync this rank's shard, and append its record; return the problem, empty if there was none."""
        temporary = self._temporary(snapshot.images_seen)
        name = f"shard-{self._comm.rank:05d}.safetensors"

        def write() -> None:
            temporary.mkdir(parents=True, exist_ok=True)
            if snapshot.tensors:
                records.append(write_shard(temporary, name, snapshot.tensors, snapshot.shapes))

        return _attempt(write)

    def commit(self, snapshot: Snapshot, gathered: Sequence[list[dict[str, Any]]]) -> str:
        """Rank 0, when every part is on storage: publish the checkpoint; return the problem, empty if none."""
        files = [record for part in gathered for record in part]
        manifest = {"format": FORMAT, "files": files, **snapshot.facts}
        final = self.folder_of(snapshot.images_seen)
        return _attempt(lambda: self._publish(self._temporary(snapshot.images_seen), final, manifest))

    def agree(self, problem: str, images_seen: int, payload: Any = None) -> list[Any]:
        """Exchange what ranks have to say. Raises: CheckpointError on all, after cleaning up, if one has a problem."""
        answers = self._comm.gather([problem, payload])
        problems = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer[0]]
        if problems:
            if self._comm.is_first:
                shutil.rmtree(self._temporary(images_seen), ignore_errors=True)
            is_full = any(os.strerror(errno.ENOSPC) in text for text in problems)
            if is_full and self._comm.is_first:
                self._make_room()
            raise (DiskFullError if is_full else CheckpointError)(f"checkpoint not written: {problems[0]}")
        return [answer[1] for answer in answers]

    @staticmethod
    def listed(records: Sequence[FileRecord]) -> list[dict[str, Any]]:
        """Records as JSON types, for `agree`."""
        return [asdict(record) for record in records]

    def _temporary(self, images_seen: int) -> Path:
        return self.folder / f".{self.folder_of(images_seen).name}.tmp"

    def _make_room(self) -> None:
        """The disk is full: the oldest checkpoint goes, so that the next one finds room; the newest stays."""
        for oldest in list_checkpoints(self.folder)[1:][-1:]:
            _log.warning("%s: removed, the disk is full", oldest)
            shutil.rmtree(oldest, ignore_errors=True)

    def _publish(self, temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        write_manifest(temporary, manifest)
        fsync(temporary)
        if final.exists():  # the same point reached again, after falling back past a damaged checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(self.folder)
        replace_text(self.folder / "latest", final.name + "\n")
        self._prune()

    def _prune(self) -> None:
        """Remove what retention does not keep."""
        keep_every = self._config.keep_every_images
        for old in list_checkpoints(self.folder)[self._config.keep_last :]:
            images = int(old.name.removeprefix("images-"))
            if not (keep_every and images % keep_every == 0):
                shutil.rmtree(old, ignore_errors=True)

    def find(self) -> Found | None:
        """The checkpoint that `checkpoint.resume` asks for, verified by all ranks together; None: start fresh.

        Raises: CheckpointError when resume is `must` or a path and there is none that verifies.
        """
        resume = self._config.resume
        if resume == "never":
            return None
        explicit = resume not in ("auto", "must")
        candidates = [Path(resume)] if explicit else list_checkpoints(self.folder)
        if explicit and not (candidates[0] / "manifest.json").exists():
            candidates = list_checkpoints(candidates[0] / "checkpoints")[:1] or candidates
        found, skipped = self._first_verified(candidates)
        if found is not None:
            return found
        if resume == "auto" and not skipped:
            return None
        reasons = "; ".join(skipped) or f"{self.folder}: is empty"
        raise CheckpointError(
            f"checkpoint.resume: {resume}: no checkpoint verifies ({reasons}); legal: never, to start afresh"
        )

    def newest(self) -> Found | None:
        """The newest checkpoint of this run that verifies, whatever `checkpoint.resume` says; all ranks together."""
        return self._first_verified(list_checkpoints(self.folder))[0]

    def _first_verified(self, candidates: Sequence[Path]) -> tuple[Found | None, list[str]]:
        """The first of rank 0's candidates that verifies, and why those before it do not."""
        skipped: list[str] = []
        for name in self._comm.from_first([str(path) for path in candidates]):
            manifest, problem = self._verify_together(Path(name))
            if manifest is not None:
                for reason in skipped:
                    _log.warning("skipped a checkpoint: %s", reason)
                return Found(Path(name), manifest, tuple(skipped)), skipped
            skipped.append(problem)
        return None, skipped

    def _verify_together(self, folder: Path) -> tuple[dict[str, Any] | None, str]:
        manifest, problem = None, ""
        try:
            manifest = read_manifest(folder)
            for record in manifest_files(manifest)[self._comm.rank :: self._comm.world]:
                verify_file(folder, record)
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in self._comm.gather(problem) if text]
        return (None, problems[0]) if problems else (manifest, "")


def collect(
    kind: str, local: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Checkpoint entries of one kind of state: flat float32 host arrays by key, and the logical shapes."""
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for span, view in named_spans(local, values, expert_ids):
        name = f"{kind}/{span.name}"
        tensors[f"{name}@{span.start}"] = view.detach().cpu().numpy()
        shapes[name] = span.shape
    return tensors, shapes


def restore(
    shards: ShardSet, kind: str, local: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> None:
    """Fill `values` (one flat tensor per shard) from a checkpoint. Raises: CheckpointError, naming the tensor."""
    for shard, flat in zip(local, values, strict=True):
        for span in spans_of(shard, expert_ids(shard.name)):
            name = f"{kind}/{span.name}"
            stored = shards.shapes.get(name)
            if stored != span.shape:
                found = "it is not there" if stored is None else f"the checkpoint holds {stored}"
                raise CheckpointError(f"{name}: the run needs shape {span.shape}, {found}")
            shards.read_into(name, span.start, flat.narrow(0, span.offset, span.numel))


def _attempt(action: Any) -> str:
    """Run a file operation; return its problem as text, empty if it worked."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or ''} {error.strerror or error}".strip()
    return ""
