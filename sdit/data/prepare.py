"""Writes a folder of shards from images in several processes, and continues an unfinished preparation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from sdit.data.bad_samples import BadSample, BadShard
from sdit.data.dataset import Shard
from sdit.data.encoders import Encoder
from sdit.data.image_list import write_image_list
from sdit.data.index import INDEX_NAME, DatasetFacts, DatasetIndex, ShardRecord, read_index, write_index
from sdit.data.journal import Journal, Recipe, opened_journal
from sdit.data.measure_latents import measure_latents
from sdit.data.names import shown
from sdit.data.pool import run_tasks
from sdit.data.shards import is_intact, read_shard, write_shard
from sdit.data.sources import ImageSource, SourceImage
from sdit.data.tar_index import TarIndex, read_tar_index
from sdit.data.tars_in_place import TarsInPlace
from sdit.errors import DataError

VERIFY_SIZE = 32  # pixels of the images of tars that --verify decodes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """The result of `prepare`: shards `written` now and `kept` from before, images `skipped`, and the folder's index."""

    written: int
    kept: int
    skipped: int
    index: DatasetIndex


@dataclass(frozen=True)
class _Task:
    """One shard to finish. `known` is its record if it was finished before. `facts` are the facts of its samples."""

    path: Path
    source: ImageSource
    encoder: Encoder
    known: ShardRecord | None
    facts: DatasetFacts
    skip_bad: bool


@dataclass(frozen=True)
class _Finished:
    """A shard's record and the labels of its samples. The record is None if all images of the shard were skipped."""

    record: ShardRecord | None
    kept: bool
    skipped: tuple[str, ...]
    labels: frozenset[int]


def prepare(
    source: ImageSource, encoder: Encoder, out: Path, samples_per_shard: int = 1024, jobs: int = 1,
    skip_bad: bool = False, allow_empty_classes: bool = False,
) -> Summary:  # fmt: skip
    """Write `source` into the folder `out`. Intact shards of an earlier preparation are kept.

    The number of processes, `jobs`, does not change a byte.

    Raises:
        DataError: if an image cannot be read and `skip_bad` is False, or if a class has no image left and
            `allow_empty_classes` is False.
        ConfigError: if `out` was made from something else.
    """
    facts = encoder.facts(source.facts)
    recipe = {**source.recipe, **encoder.recipe, "samples_per_shard": samples_per_shard, "skip_bad": skip_bad}
    out.mkdir(parents=True, exist_ok=True)
    earlier = () if source.listing is None else source.listing.contents()[:-1]
    before = read_index(out) if (out / INDEX_NAME).exists() else None
    with opened_journal(out, recipe, ShardRecord, before, earlier) as journal, _progress_bar(len(source)) as bar:
        if source.listing is not None:
            write_image_list(out, source.listing)
        tasks = (
            _Task(out / name, source.subset(first, last), encoder, journal.finished.get(name), facts, skip_bad)
            for name, first, last in _shards(source, samples_per_shard)
        )
        finished = _collect(run_tasks(_finish, tasks, jobs), journal, bar)
        present = frozenset[int]().union(*(result.labels for result in finished))
        if not allow_empty_classes:
            _refuse_emptied_classes(source, finished, present)
        index = _index(facts, recipe, [result.record for result in finished if result.record is not None], present)
        if facts.kind == "latents":
            measured = index.facts.model_copy(update={"latent_stats": measure_latents(out, index.shards, index.facts)})
            index = index.model_copy(update={"facts": measured})
        if index != before or not (out / INDEX_NAME).exists():
            write_index(out, index)
    kept = sum(result.kept for result in finished)
    return Summary(len(index.shards) - kept, kept, len(source) - index.facts.total, index)


def _collect(results: Iterable[_Finished], journal: Journal[ShardRecord], bar: tqdm) -> list[_Finished]:
    """Return all results. Each is logged, written to the journal and counted by the bar as it arrives."""
    finished = []
    for result in results:
        for fault in result.skipped:
            _log.warning("skipped: %s", fault)
        finished.append(result)
        if result.record is not None:
            if not result.kept:
                journal.add(result.record)
            bar.update(result.record.samples)
    return finished


def verify(folder: Path, jobs: int = 1) -> tuple[DatasetIndex, list[str]]:
    """Return the folder's index and one line for each shard and sample that does not match the index."""
    index = read_index(folder)
    tasks = [(folder, record, index.facts) for record in index.shards]
    problems: list[str] = []
    with _progress_bar(index.facts.total) as bar:
        for samples, found in run_tasks(_verify_shard, tasks, jobs):
            problems += found
            bar.update(samples)
    return index, sorted(problems)


def _shards(source: ImageSource, samples_per_shard: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the first position and the end of each shard. A shard never holds images of two batches."""
    start = number = 0
    for count in (len(source),) if source.listing is None else source.listing.batches:
        for first in range(start, start + count, samples_per_shard):
            yield f"shard-{number:06d}.tar", first, min(first + samples_per_shard, start + count)
            number += 1
        start += count


def _finish(task: _Task) -> _Finished:
    if task.known is not None and is_intact(task.path.parent, task.known):
        return _kept(task, task.known)
    skipped: list[str] = []
    labels: set[int] = set()
    record = write_shard(task.path, task.encoder.encode(_readable(task, skipped, labels)))
    return _Finished(record, False, tuple(skipped), frozenset(labels))


def _kept(task: _Task, known: ShardRecord) -> _Finished:
    missing = len(task.source) - known.samples
    if not missing:
        return _Finished(known, True, (), frozenset(map(int, task.source.labels)))
    if not task.skip_bad:
        raise DataError(
            f"{shown(task.path)}: {missing} of its {len(task.source)} images are missing because --skip-bad left them out; give "
            "--skip-bad again, or choose another folder"
        )
    shard = read_shard(task.path.parent, known, task.facts)
    return _Finished(known, True, (), frozenset(shard.sample(member).label for member in range(len(shard))))


def _readable(task: _Task, skipped: list[str], labels: set[int]) -> Iterator[SourceImage]:
    """Yield the task's readable images and add their labels to `labels`. Unreadable images are added to `skipped`."""
    for image in task.source.images():
        if isinstance(image.pixels, np.ndarray):
            labels.add(image.label)
            yield image
        elif task.skip_bad:
            skipped.append(str(image.pixels))
        else:
            raise DataError(f"{image.pixels}; --skip-bad leaves out what cannot be read")


def _refuse_emptied_classes(source: ImageSource, finished: list[_Finished], present: frozenset[int]) -> None:
    """Check that each class has at least one readable image.

    Raises: DataError: if a class has none.
    """
    emptied = sorted(frozenset(map(int, source.labels)) - present)
    if not emptied:
        return
    names = source.facts.class_names
    classes = ", ".join(shown(names[label]) if names else f"label {label}" for label in emptied)
    last = next((result.skipped[-1] for result in reversed(finished) if result.skipped), "skipped before")
    raise DataError(
        f"--skip-bad leaves classes without images: {classes}; --allow-empty-classes keeps their labels; "
        f"the last image: {last}"
    )


def _index(facts: DatasetFacts, recipe: Recipe, shards: list[ShardRecord], present: frozenset[int]) -> DatasetIndex:
    """Return the index of the shards, whose images have the labels `present`.

    Raises: DataError: if no image can be read.
    """
    total = sum(record.samples for record in shards)
    if not total:
        raise DataError(f"none of {facts.total} images can be read")
    ordered = tuple(sorted(shards, key=lambda record: record.name))
    empty = tuple(sorted(frozenset(range(facts.classes)) - present))
    counted = facts.model_copy(update={"total": total, "empty_classes": empty})
    return DatasetIndex(facts=counted, recipe=recipe, shards=ordered)


def _verify_shard(task: tuple[Path, ShardRecord, DatasetFacts]) -> tuple[int, list[str]]:
    return task[1].samples, _problems(lambda: read_shard(*task))


def verify_tars(folder: Path, jobs: int = 1) -> tuple[TarIndex, list[str]]:
    """Return the folder's index and one line for each tar and image that does not match it. Each image is decoded."""
    index = read_tar_index(folder)
    tasks = [(folder, number) for number in range(len(index.shards))]
    return index, sorted(problem for found in run_tasks(_verify_tar, tasks, jobs) for problem in found)


def _verify_tar(task: tuple[Path, int]) -> list[str]:
    folder, number = task
    return _problems(lambda: TarsInPlace(folder, VERIFY_SIZE, channels=3).open(number))


def _problems(open_shard: Callable[[], Shard]) -> list[str]:
    """Return one line for each bad sample of a shard, and one if the shard itself is bad."""
    problems = []
    try:
        shard = open_shard()
        for member in range(len(shard)):
            try:
                shard.sample(member)
            except BadSample as fault:
                problems.append(str(fault))
    except BadShard as fault:
        problems.append(str(fault))
    return problems


def _progress_bar(samples: int) -> tqdm:
    return tqdm(total=samples, unit="img", disable=None)  # None: shown on a terminal only
