"""Data sets the loader reads: a prepared folder, or the digits in memory. Both are shards of samples."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from sdit.config import DataConfig, ModelConfig
from sdit.data.decode import Sample
from sdit.data.digits import DIGITS_FACTS, digits
from sdit.data.index import DatasetFacts, read_index
from sdit.data.shards import read_shard
from sdit.errors import DataError

DIGITS_PER_SHARD = 256
_log = logging.getLogger(__name__)


class Shard(Protocol):
    """A shard that was opened; it needs no file any more."""

    def __len__(self) -> int: ...

    def sample(self, member: int) -> Sample:
        """The sample at a position of the shard; BadSample when it cannot be used."""
        ...


class Dataset(Protocol):
    """Shards of `counts` samples each. Data sets of equal `fingerprint` hold the same samples in the same order."""

    facts: DatasetFacts
    counts: tuple[int, ...]

    @property
    def fingerprint(self) -> str: ...

    def open(self, shard: int) -> Shard:
        """Read a shard; BadShard when none of it can be used."""
        ...


class PreparedFolder:
    """A folder of tar shards with an index.json."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self.facts = index.facts
        self.counts = tuple(record.samples for record in index.shards)
        self.fingerprint = index.fingerprint
        self._records = index.shards
        self._folder = folder

    def open(self, shard: int) -> Shard:
        return read_shard(self._folder, self._records[shard], self.facts)


class EmbeddedDigits:
    """The digits of scikit-learn; shards are slices of them, as `prepare digits --samples-per-shard 256` cuts them."""

    def __init__(self) -> None:
        self.facts = DIGITS_FACTS
        self._starts = range(0, DIGITS_FACTS.total, DIGITS_PER_SHARD)
        self.counts = tuple(min(DIGITS_PER_SHARD, DIGITS_FACTS.total - start) for start in self._starts)

    @cached_property
    def fingerprint(self) -> str:
        pixels, labels = digits()
        content = hashlib.sha256(f"digits {self.counts}\n".encode())
        content.update(pixels.tobytes() + labels.tobytes())
        return content.hexdigest()

    def open(self, shard: int) -> Shard:
        return _DigitsShard(self._starts[shard], self.counts[shard])


class _DigitsShard:
    def __init__(self, start: int, count: int) -> None:
        self._start = start
        self._count = count

    def __len__(self) -> int:
        return self._count

    def sample(self, member: int) -> Sample:
        pixels, labels = digits()
        return Sample(pixels[self._start + member], int(labels[self._start + member]))


def open_dataset(data: DataConfig) -> Dataset:
    """The data set that the configuration names; DataError when it is not there."""
    return EmbeddedDigits() if data.source == "digits" else PreparedFolder(_folder(data))


def dataset_facts(data: DataConfig) -> DatasetFacts:
    """What the data set's samples have in common, without reading any of them."""
    return DIGITS_FACTS if data.source == "digits" else read_index(_folder(data)).facts


def data_kind(data: DataConfig) -> Literal["images", "latents"] | None:
    """What the data set's samples are; None if it is no longer there."""
    try:
        return dataset_facts(data).kind
    except (DataError, OSError):
        return None


def data_recipe(data: DataConfig) -> dict[str, Any]:
    """What a prepared folder was made from; empty if it is not there or not one."""
    try:
        return {} if data.source == "digits" else read_index(_folder(data)).recipe
    except (DataError, OSError):
        return {}


def check_fit(facts: DatasetFacts, data: DataConfig, model: ModelConfig, key: str = "data.path") -> None:
    """DataError unless the model takes the data set's samples as they are; `key` names the folder in the message."""
    where = "the embedded digits" if data.source == "digits" else f"{key} {data.path}"
    if facts.size != model.input_size:
        raise DataError(f"model.input_size: {model.input_size}, but {where} holds {facts.kind} of size {facts.size}")
    if facts.channels != model.channels:
        raise DataError(
            f"model.channels: {model.channels}, but {where} holds {facts.kind} of {facts.channels} channels"
        )
    if model.classes and not 0 < facts.classes <= model.classes:
        held = f"{facts.classes} classes; legal: {facts.classes}" if facts.classes else "no labels; legal: 0"
        raise DataError(f"model.classes: {model.classes}, but {where} holds {held}")
    if data.flip and facts.kind == "latents" and not facts.mirrored:
        raise DataError(f"data.flip: True, but {where} holds no latents of mirrored images; prepare them with --flip")
    if facts.latent_scale is not None and facts.latent_scale != data.latent_scale:
        _log.warning("data.latent_scale: %g, but the VAE was made for %g", data.latent_scale, facts.latent_scale)


def _folder(data: DataConfig) -> Path:
    assert data.path is not None  # DataConfig refuses source shards without a path
    return Path(data.path)
