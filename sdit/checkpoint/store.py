"""The checkpoints of one run folder. All ranks write them, rank 0 commits them, and all ranks agree on the one to load."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.checkpoint.files import (
    FORMAT,
    NODE_FORMAT,
    ShardPlace,
    ShardRecord,
    shard_size,
    shard_table,
    write_manifest,
    write_shard,
)
from sdit.checkpoint.find import Found, list_aside, list_checkpoints, read_checked, verify_share
from sdit.checkpoint.index import MAX_RANGES, ShardIndex, ShardTable
from sdit.checkpoint.node_files import Nodes
from sdit.checkpoint.shard_reports import append_report, take_reports
from sdit.checkpoint.shard_set import ShardSet
from sdit.config import CheckpointConfig
from sdit.distributed.comm import Comm
from sdit.distributed.shards import Shard
from sdit.errors import CheckpointError
from sdit.expert_parallel.logical_tensors import ExpertIds, logical_shards, shards_with_values
from sdit.files import DISK_FULL, fsync, remove_folder, replace_text
from sdit.supervise.run_folder import RunFolder

_log = logging.getLogger(__name__)
PROBLEMS_SHOWN = 4


class DiskFullError(CheckpointError):
    """There is no space for a checkpoint. Rank 0 has removed an old checkpoint, if it could spare one."""


@dataclass(frozen=True)
class Problem:
    """The reason why a rank could not write its shard.

    `is_full`: the disk is full, so a retry may work after an old checkpoint is removed.
    """

    text: str
    is_full: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The state of this rank: flat float32 `tensors` by key, logical `shapes`, and `facts` for the manifest.

    `is_live`: some tensors are views of the state, which the next step changes. `wait` returns once the tensors hold the
    state, which may be on its way from a GPU.
    """

    images_seen: int
    tensors: Mapping[str, np.ndarray]
    shapes: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, Any]
    is_live: bool = True
    wait: Callable[[], None] = lambda: None


class CheckpointStore:
    """Saves and finds the checkpoints under `folder`, together with the other ranks.

    If `run_folder` is given, the checkpoints are in its subfolder `subfolder`, also after the run folder was renamed. All ranks
    create it together while the run starts.
    """

    subfolder = "checkpoints"

    def __init__(self, folder: Path, config: CheckpointConfig, comm: Comm, run_folder: RunFolder | None = None) -> None:
        self._folder, self._config, self._comm = folder, config, comm
        self._run_folder = run_folder
        self._nodes = Nodes(comm)

    @property
    def folder(self) -> Path:
        """The current folder of the checkpoints."""
        return self._folder if self._run_folder is None else self._run_folder / self.subfolder

    def folder_of(self, images_seen: int) -> Path:
        """Return the folder of the checkpoint at `images_seen`, which exists once it is committed."""
        return self.folder / f"images-{images_seen:012d}"

    def begin(self, images_seen: int) -> None:
        """Set later checkpoints aside and remove temporary files. Rank 0 calls it before the run continues at `images_seen`.

        Retention also applies to checkpoints that were set aside: `_prune` removes them after the next commit.
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
                _log.warning("%s: the run continues from an earlier point; the checkpoint is now %s", later, aside.name)

    def save(self, snapshot: Snapshot) -> Path:
        """Write this rank's shard, wait for all ranks, commit, and return the new folder.

        The folder gets its final name only after all files of all ranks are on storage. If the disk or a quota is full, rank 0
        frees space and all ranks retry once.

        Raises: CheckpointError: on all ranks, if any rank could not write. The previous checkpoint does not change.
        """
        try:
            return self._save(snapshot)
        except DiskFullError:
            return self._save(snapshot)

    def _save(self, snapshot: Snapshot) -> Path:
        self.agree(self.write_shard(snapshot, self.place(snapshot)), snapshot.images_seen)
        self.agree(self.commit(snapshot) if self._comm.is_first else None, snapshot.images_seen)
        return self.folder_of(snapshot.images_seen)

    def place(self, snapshot: Snapshot) -> ShardPlace | None:
        """Return where this rank writes its shard, None for a file of its own. All ranks call it before they write."""
        if self._config.files == "rank":
            return None
        return self._nodes.place(shard_size(snapshot.tensors, snapshot.shapes))

    def write_shard(self, snapshot: Snapshot, place: ShardPlace | None = None) -> Problem | None:
        """Write and fsync this rank's shard and report it to rank 0. Return the problem, or None if there was none."""
        temporary = self._temporary(snapshot.images_seen)
        name = f"shard-{self._comm.rank:05d}.safetensors" if place is None else place.name

        def write() -> None:
            temporary.parent.mkdir(parents=self._run_folder is None, exist_ok=True)
            temporary.mkdir(exist_ok=True)
            shard = None
            if snapshot.tensors:
                snapshot.wait()
                record = write_shard(temporary, name, snapshot.tensors, snapshot.shapes, place)
                table = shard_table(snapshot.tensors, snapshot.shapes, record.start)
                shard = {"record": vars(record), "ranges": table.ranges, "shapes": table.shapes}
            append_report(temporary, self._nodes.own, self._comm.rank, shard)

        return _attempt(write, temporary / name)

    def commit(self, snapshot: Snapshot) -> Problem | None:
        """Publish the checkpoint. Rank 0 calls it after all shards are on storage. Return the problem, or None."""
        final, temporary = self.folder_of(snapshot.images_seen), self._temporary(snapshot.images_seen)

        def publish() -> None:
            shards = take_reports(temporary, self._nodes.of_rank)
            self._publish(temporary, final, make_manifest(shards, snapshot.facts))

        return _attempt(publish, final)

    def agree(self, problem: Problem | None, images_seen: int) -> None:
        """Return if no rank has a problem. What a rank receives does not grow with the ranks.

        Raises: CheckpointError: on all ranks, if one has a problem. The message holds the problems. No rank returns before
            rank 0 has removed the shards and freed space. Otherwise a rank could rewrite a shard that rank 0 then removes.
        """
        flags = [problem is not None, problem is not None and problem.is_full]
        failed, full = self._comm.sum(torch.tensor(flags, dtype=torch.float64, device=self._comm.device)).tolist()
        if not failed:
            return
        reports = self._comm.first_reports(None if problem is None else problem.text, PROBLEMS_SHOWN)
        if self._run_folder is not None and self._run_folder.now is None:
            self._run_folder.check()
        if self._comm.is_first:
            shutil.rmtree(self._temporary(images_seen), ignore_errors=True)
            if full:
                self._free_space()
        self._comm.from_first(None)
        texts = "; ".join(f"rank {rank}: {text}" for rank, text in reports.items())
        more = f"; and {int(failed) - len(reports)} ranks more" if failed > len(reports) else ""
        raise (DiskFullError if full else CheckpointError)(f"checkpoint not written: {texts}{more}")

    def _temporary(self, images_seen: int) -> Path:
        return self.folder / f".{self.folder_of(images_seen).name}.tmp"

    def _free_space(self) -> None:
        """Remove the checkpoints that were set aside, or else the oldest checkpoint. The newest one is kept."""
        for oldest in list_aside(self.folder) or list_checkpoints(self.folder)[1:][-1:]:
            _log.warning("%s: removed, because the disk or the quota is full", oldest)
            remove_folder(oldest)

    def _publish(self, temporary: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        write_manifest(temporary, manifest)
        fsync(temporary)
        if final.exists():  # the run reached the same point again after it skipped a damaged checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync(self.folder)
        replace_text(self.folder / "latest", final.name + "\n")
        self._prune()

    def _prune(self) -> None:
        """Remove the checkpoints that retention does not keep, including those that were set aside."""
        keep_last, keep_every = self._config.keep_last, self._config.keep_every_images
        for folders in (list_checkpoints(self.folder), list_aside(self.folder)):
            for old in folders[keep_last:]:
                images = int(old.name.rpartition("-")[2])
                if not (keep_every and images % keep_every == 0):
                    remove_folder(old)

    def find(self) -> Found | None:
        """Return the checkpoint that `checkpoint.resume` selects, or None for a new run. All ranks verify it together.

        Raises: CheckpointError: if resume is `must` or a path and no checkpoint verifies.
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
        reasons, legal = "; ".join(skipped) or f"{self.folder}: is empty", "never, to start a new run"
        raise CheckpointError(f"checkpoint.resume: {resume}: no checkpoint verifies ({reasons}); legal: {legal}")

    def newest(self) -> Found | None:
        """Return the newest verified checkpoint of this run, independent of `checkpoint.resume`. All ranks call it."""
        return self._first_verified(list_checkpoints(self.folder))[0]

    def _first_verified(self, candidates: Sequence[Path]) -> tuple[Found | None, list[str]]:
        """Return the first of rank 0's candidates that verifies, and the problems of the candidates before it."""
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
        """Return the manifest, read by rank 0, and the first problem that a rank found."""
        manifest, problem = None, ""
        if self._comm.is_first:
            try:
                manifest = read_checked(folder)
            except CheckpointError as error:
                problem = str(error)
        manifest, problem = self._comm.from_first([manifest, problem])
        if manifest is None:
            return None, problem
        try:
            verify_share(folder, manifest, self._comm.rank, self._comm.world)
        except CheckpointError as error:
            problem = str(error)
        problems = self._comm.first_reports(problem or None, 1)
        return (None, *problems.values()) if problems else (manifest, "")


def make_manifest(reported: Sequence[Mapping[str, Any] | None], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a checkpoint, given the shard that each rank reported.

    An index that would be too large for a manifest is left out. Readers then read the headers of all shards.
    """
    shards = [shard for shard in reported if shard is not None]
    records = [ShardRecord(**shard["record"]) for shard in shards]
    order = sorted(range(len(shards)), key=lambda n: (records[n].name, records[n].start))
    index = ShardIndex.of([ShardTable(shards[n]["ranges"], shards[n]["shapes"]) for n in order])
    return {
        "format": NODE_FORMAT if any(record.is_shared for record in records) else FORMAT,
        "files": [records[n].to_json() for n in order],
        **({"index": index.to_json()} if len(index) <= MAX_RANGES else {}),
        **facts,
    }


def collect(
    kind: str, local: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the checkpoint entries of one kind of state: flat float32 views by key, and the logical shapes."""
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, view in shards_with_values(local, values, expert_ids):
        name = f"{kind}/{shard.name}"
        tensors[f"{name}@{shard.start}"] = view
        shapes[name] = shard.shape
    return tensors, shapes


def restore(
    shards: ShardSet, kind: str, local: Sequence[Shard], values: Sequence[Tensor], expert_ids: ExpertIds
) -> None:
    """Fill `values` (one flat tensor per shard) from a checkpoint.

    Raises: CheckpointError: if a tensor is missing, incomplete or has another shape. The message names it.
    """
    for shard, flat in zip(local, values, strict=True):
        for logical in logical_shards(shard, expert_ids(shard.name)):
            name = f"{kind}/{logical.name}"
            stored = shards.shapes.get(name)
            if stored != logical.shape:
                found = "it is missing" if stored is None else f"the checkpoint holds {stored}"
                raise CheckpointError(f"{name}: the run needs shape {logical.shape}, {found}")
            shards.read_into(name, logical.start, flat.narrow(0, logical.offset, logical.numel))


def _attempt(action: Callable[[], object], path: Path) -> Problem | None:
    """Run a file operation on `path`. Return its problem, or None if it succeeded."""
    try:
        action()
    except OSError as error:
        return Problem(f"{error.filename or path}: {error.strerror or error}", error.errno in DISK_FULL)
    except CheckpointError as error:
        return Problem(str(error))
    return None
