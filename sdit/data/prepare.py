"""Writes a folder of shards from pictures, over processes, and goes on where an earlier run of it was stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from sdit.data.encoders import Encoder
from sdit.data.faults import BadSample, BadShard
from sdit.data.index import INDEX_NAME, DatasetFacts, DatasetIndex, ShardRecord, read_index, write_index
from sdit.data.journal import Recipe, opened_journal
from sdit.data.pool import run_tasks
from sdit.data.shards import is_intact, read_shard, write_shard
from sdit.data.sources import Picture, PictureSource
from sdit.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What `prepare` did: shards `written` now and `kept` from before, pictures `skipped`, and the folder's index."""

    written: int
    kept: int
    skipped: int
    index: DatasetIndex


@dataclass(frozen=True)
class _Task:
    """One shard to finish; `known` is its record if it was finished before."""

    path: Path
    part: PictureSource
    encoder: Encoder
    known: ShardRecord | None
    skip_bad: bool


@dataclass(frozen=True)
class _Finished:
    record: ShardRecord
    kept: bool
    skipped: tuple[str, ...]


def prepare(
    source: PictureSource,
    encoder: Encoder,
    out: Path,
    samples_per_shard: int = 1024,
    jobs: int = 1,
    skip_bad: bool = False,
) -> Summary:
    """Write `source` into the folder `out`; shards that are there and intact are kept. `jobs` does not change a byte.

    A picture that cannot be read is a DataError, or is left out if `skip_bad`.
    """
    facts = encoder.facts(source.facts)
    recipe = {**source.recipe, **encoder.recipe, "samples_per_shard": samples_per_shard, "skip_bad": skip_bad}
    out.mkdir(parents=True, exist_ok=True)
    finished: dict[str, _Finished] = {}
    with opened_journal(out, recipe) as journal, _progress_bar(len(source)) as bar:
        tasks = _tasks(source, encoder, out, samples_per_shard, journal.finished, skip_bad)
        for result in run_tasks(_finish, tasks, jobs):
            for fault in result.skipped:
                _log.warning("skipped: %s", fault)
            if not result.kept:
                journal.add(result.record)
            finished[result.record.name] = result
            bar.update(result.record.samples)
        index = _index(facts, recipe, [finished[name].record for name in sorted(finished)])
        if not (out / INDEX_NAME).exists() or read_index(out) != index:
            write_index(out, index)
    kept = sum(result.kept for result in finished.values())
    return Summary(len(finished) - kept, kept, len(source) - index.facts.total, index)


def verify(folder: Path, jobs: int = 1) -> tuple[DatasetIndex, list[str]]:
    """The folder's index, and one line for every shard and sample that is not what the index says."""
    index = read_index(folder)
    tasks = [(folder, record, index.facts) for record in index.shards]
    problems: list[str] = []
    with _progress_bar(index.facts.total) as bar:
        for samples, found in run_tasks(_verify_shard, tasks, jobs):
            problems += found
            bar.update(samples)
    return index, sorted(problems)


def _tasks(
    source: PictureSource,
    encoder: Encoder,
    out: Path,
    samples_per_shard: int,
    finished: dict[str, ShardRecord],
    skip_bad: bool,
) -> Iterator[_Task]:
    for number, first in enumerate(range(0, len(source), samples_per_shard)):
        name = f"shard-{number:06d}.tar"
        part = source.part(first, min(first + samples_per_shard, len(source)))
        yield _Task(out / name, part, encoder, finished.get(name), skip_bad)


def _finish(task: _Task) -> _Finished:
    if task.known is not None and is_intact(task.path.parent, task.known):
        return _Finished(task.known, kept=True, skipped=())
    skipped: list[str] = []
    record = write_shard(task.path, task.encoder.encode(_readable(task, skipped)))
    if record is None:
        raise DataError(
            f"{task.path.name}: none of its {len(task.part)} pictures can be read; the last one: {skipped[-1]}"
        )
    return _Finished(record, kept=False, skipped=tuple(skipped))


def _readable(task: _Task, skipped: list[str]) -> Iterator[Picture]:
    """The task's pictures without those that cannot be read, which are added to `skipped`."""
    for picture in task.part.pictures():
        if isinstance(picture.pixels, np.ndarray):
            yield picture
        elif task.skip_bad:
            skipped.append(str(picture.pixels))
        else:
            raise picture.pixels


def _index(facts: DatasetFacts, recipe: Recipe, shards: list[ShardRecord]) -> DatasetIndex:
    total = sum(record.samples for record in shards)
    return DatasetIndex(facts=facts.model_copy(update={"total": total}), recipe=recipe, shards=tuple(shards))


def _verify_shard(task: tuple[Path, ShardRecord, DatasetFacts]) -> tuple[int, list[str]]:
    folder, record, facts = task
    try:
        shard = read_shard(folder, record, facts)
    except BadShard as fault:
        return record.samples, [str(fault)]
    problems = []
    for member in range(len(shard)):
        try:
            shard.sample(member)
        except BadSample as fault:
            problems.append(str(fault))
    return record.samples, problems


def _progress_bar(samples: int) -> tqdm:
    return tqdm(total=samples, unit="img", disable=None)  # None: shown on a terminal only
