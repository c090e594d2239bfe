"""The checkpoints of one run directory: written by all ranks, committed by one, found again by agreement."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sdit.checkpoint.files import (
    FORMAT,
    FileRecord,
    ShardSet,
    manifest_files,
    read_manifest,
    verify_file,
    write_manifest,
    write_shard,
)
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.distributed.shards import Shard
from sdit.errors import CheckpointError
from sdit.expert_parallel.logical_tensors import ExpertIds, named_spans, spans_of
from sdit.files import fsync, replace_text
from sdit.supervise.run_folder import RunFolder

_log = logging.getLogger(__name__)
_NAME = re.compile(r"images-(\d{12})")
_ASIDE = re.compile(r"aside-images-(\d{12})")
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the quota of its user, group or project
PROBLEMS_SHOWN = 4


class DiskFullError(CheckpointError):
    """There was no room for a checkpoint; rank 0 has removed an old one if there was one to spare."""


@dataclass(frozen=True)
class Problem:
    """Why a rank could not write its part; `is_full`: there may be room once an old checkpoint is gone."""

    text: str
    is_full: bool = False


@dataclass(frozen=True)
class Found:
    """A verified checkpoint: its folder, its manifest, and why newer ones were passed over."""

    folder: Path
    manifest: dict[str, Any]
    skipped: tuple[str, ...] = ()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a `checkpoints` folder, newest first. Checksums are not verified here."""
    return _folders(folder, _NAME)


def list_aside(folder: Path) -> list[Path]:
    """Return the checkpoints that `begin` put aside, the last one first."""
    return sorted(_folders(folder, _ASIDE), key=_modified, reverse=True)


def _folders(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_dir()), reverse=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


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


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises: CheckpointError, also when the folder's name states another moment."""
    manifest, name = read_manifest(folder), _NAME.fullmatch(folder.name)
    images_seen = manifest["clock"]["images_seen"]
    if name is not None and int(name[1]) != images_seen:
        raise CheckpointError(
            f"{folder}: its manifest is of {images_seen} images; legal: the name images-{images_seen:012d}"
        )
    return manifest


def _verified(folder: Path) -> dict[str, Any]:
    manifest = _read(folder)
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
    """Saves and finds the checkpoints under `folder`, together with the other ranks.

    With `run_folder`, they are in its `checkpoints`, wherever the run folder was renamed to.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, comm: Comm, run_folder: RunFolder | None = None) -> None:
        self._folder, self._config, self._comm = folder, config, comm
        self._run_folder = run_folder

    @property
    def folder(self) -> Path:
        """Where the checkpoints are now."""
        return self._folder if self._run_folder is None else self._run_folder / "checkpoints"

    def folder_of(self, images_seen: int) -> Path:
        """Return the folder of the checkpoint of a moment, once it is committed."""
        return self.folder / f"images-{images_seen:012d}"

    def begin(self, images_seen: int) -> None:
        """Rank 0, before the run continues from `images_seen`: put later checkpoints aside, and remove leftovers.

        What was put aside follows the retention of checkpoints: `_prune` removes it after the next commit.
        """
        for leftover in self.folder.glob(".images-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.folder.glob(".latest.*.tmp"):
            leftover.unlink(missing_ok=True)
        for later in list_checkpoints(self.folder):
            if int(later.name.removeprefix("images-")) > images_seen:
                aside = self.folder / f"aside-{later.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(later, aside)
                os.utime(aside)
                _log.warning("%s: the run continues from before it; it is now %s", later, aside.name)

    def save(self, snapshot: Snapshot) -> Path:
        """Write this rank's part, wait for all ranks, commit; return the new folder.

        The folder appears under its name only when every file of every rank is on storage. If the disk or a quota is full,
        all ranks try once more after rank 0 has made room.
        Raises: CheckpointError on every rank when any rank could not write; the previous checkpoint stays as it was.
        """
        try:
            return self._save(snapshot)
        except DiskFullError:
            return self._save(snapshot)

    def _save(self, snapshot: Snapshot) -> Path:
        records: list[FileRecord] = []
        problem = self.write_part(snapshot, records)
        gathered = self.agree(problem, snapshot.images_seen, self.listed(records))
        problem = self.commit(snapshot, gathered) if self._comm.is_first else None
        self.agree(problem, snapshot.images_seen)
        return self.folder_of(snapshot.images_seen)

    def write_part(self, snapshot: Snapshot, records: list[FileRecord]) -> Problem | None:
        """Write and fsync this rank's shard, and append its record; return the problem, None if there was none."""
        temporary = self._temporary(snapshot.images_seen)
        name = f"shard-{self._comm.rank:05d}.safetensors"

        def write() -> None:
            temporary.parent.mkdir(parents=self._run_folder is None, exist_ok=True)
            temporary.mkdir(exist_ok=True)
            if snapshot.tensors:
                records.append(write_shard(temporary, name, snapshot.tensors, snapshot.shapes))

        return _attempt(write, temporary / name)

    def commit(self, snapshot: Snapshot, gathered: Sequence[list[dict[str, Any]]]) -> Problem | None:
        """Rank 0, when every part is on storage: publish the checkpoint; return the problem, None if there was none."""
        files = [record for part in gathered for record in part]
        manifest = {"format": FORMAT, "files": files, **snapshot.facts}
        final = self.folder_of(snapshot.images_seen)
        return _attempt(lambda: self._publish(self._temporary(snapshot.images_seen), final, manifest), final)

    def agree(self, problem: Problem | None, images_seen: int, payload: Any = None) -> list[Any]:
        """Return every rank's `payload`.

        Raises: CheckpointError on all ranks if one has a problem, with the text of each. Every rank leaves only after rank 0
            has removed the parts and made room, so that no rank writes a part again that rank 0 is about to remove.
        """
        answers = self._comm.gather([None if problem is None else asdict(problem), payload])
        problems = {rank: Problem(**answer[0]) for rank, answer in enumerate(answers) if answer[0] is not None}
        if not problems:
            return [answer[1] for answer in answers]
        if self._run_folder is not None and self._run_folder.now is None:
            self._run_folder.check()
        is_full = any(found.is_full for found in problems.values())
        if self._comm.is_first:
            shutil.rmtree(self._temporary(images_seen), ignore_errors=True)
            if is_full:
                self._make_room()
        self._comm.from_first(None)
        raise (DiskFullError if is_full else CheckpointError)(f"checkpoint not written: {_described(problems)}")

    @staticmethod
    def listed(records: Sequence[FileRecord]) -> list[dict[str, Any]]:
        """Records as JSON types, for `agree`."""
        return [asdict(record) for record in records]

    def _temporary(self, images_seen: int) -> Path:
        return self.folder / f".{self.folder_of(images_seen).name}.tmp"

    def _make_room(self) -> None:
        """Remove what was put aside, or else the oldest checkpoint, so that the next one finds room; the newest stays."""
        for oldest in list_aside(self.folder) or list_checkpoints(self.folder)[1:][-1:]:
            _log.warning("%s: removed, the disk or the quota is full", oldest)
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
        """Remove what retention does not keep, of the checkpoints and of those put aside."""
        keep_last, keep_every = self._config.keep_last, self._config.keep_every_images
        for folders in (list_checkpoints(self.folder), list_aside(self.folder)):
            for old in folders[keep_last:]:
                images = int(old.name.rpartition("-")[2])
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
        """Return the newest checkpoint of this run that verifies. `checkpoint.resume` does not matter. All ranks call this."""
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
            manifest = _read(folder)
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


def _attempt(action: Callable[[], object], path: Path) -> Problem | None:
    """Run a file operation on `path`; return its problem, None if it worked."""
    try:
        action()
    except OSError as error:
        return Problem(f"{error.filename or path}: {error.strerror or error}", error.errno in FULL)
    return None


def _described(problems: Mapping[int, Problem]) -> str:
    """What went wrong on which rank, in one line."""
    texts = [f"rank {rank}: {problem.text}" for rank, problem in problems.items()]
    more = f"; and {len(texts) - PROBLEMS_SHOWN} ranks more" if len(texts) > PROBLEMS_SHOWN else ""
    return "; ".join(texts[:PROBLEMS_SHOWN]) + more
