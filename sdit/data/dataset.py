"""The data sets that the loader reads: a prepared folder, or the digits in memory. Both consist of shards."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from sdit.config import DataConfig, ModelConfig
from sdit.data.decode import DecodedSamples, Sample
from sdit.data.digits import DIGITS_FACTS, digits
from sdit.data.index import DatasetFacts, read_index
from sdit.data.shards import read_shard
from sdit.errors import DataError

DIGITS_PER_SHARD = 256
_log = logging.getLogger(__name__)


class Shard(Protocol):
    """An open shard in memory. It no longer needs its file."""

    @property
    def decoded(self) -> DecodedSamples | None:
        """The samples that were decoded when the shard was opened. None: each is decoded when it is read."""
        ...

    def __len__(self) -> int: ...

    def sample(self, member: int) -> Sample:
        """Return the sample at a position of the shard.

        Raises: BadSample: if the sample cannot be used.
        """
        ...


class Dataset(Protocol):
    """A data set of shards with `counts` samples each.

    Data sets with equal `fingerprint` hold the same samples in the same order.
    """

    facts: DatasetFacts
    counts: tuple[int, ...]

    @property
    def fingerprint(self) -> str: ...

    def open(self, shard: int) -> Shard:
        """Read a shard.

        Raises: BadShard: if no sample of the shard can be used.
        """
        ...


class PreparedFolder:
    """A data set in a folder of tar shards with an index.json."""

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
    """The digits of scikit-learn, cut into shards in memory.

    The shards are equal to those of `sdit prepare digits --samples-per-shard 256`.
    """

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
        pixels, labels = digits()
        samples = slice(start, start + count)
        self.decoded = DecodedSamples(pixels[samples], labels[samples], np.arange(count))

    def __len__(self) -> int:
        return len(self.decoded.row)

    def sample(self, member: int) -> Sample:
        return Sample(self.decoded.values[member], int(self.decoded.labels[member]))


def open_dataset(data: DataConfig) -> Dataset:
    """Return the data set that the configuration names.

    Raises: DataError: if the data set does not exist or its index is not valid.
    """
    return EmbeddedDigits() if data.source == "digits" else PreparedFolder(_folder(data))


def dataset_facts(data: DataConfig) -> DatasetFacts:
    """Return the facts of a data set without reading a sample.

    Raises: DataError: if the data set does not exist or its index is not valid.
    """
    return DIGITS_FACTS if data.source == "digits" else read_index(_folder(data)).facts


def data_kind(data: DataConfig) -> Literal["images", "latents"] | None:
    """Return the kind of the samples, or None if the data set cannot be read."""
    try:
        return dataset_facts(data).kind
    except (DataError, OSError):
        return None


def data_recipe(data: DataConfig) -> dict[str, Any]:
    """Return the recipe of a prepared folder. Return an empty dict for the digits or if the folder cannot be read."""
    try:
        return {} if data.source == "digits" else read_index(_folder(data)).recipe
    except (DataError, OSError):
        return {}


def check_fit(facts: DatasetFacts, data: DataConfig, model: ModelConfig, key: str = "data.path") -> None:
    """Check that the model can take the samples of the data set. `key` names the folder in the message.

    Raises: DataError: if size, channels, number of classes or mirrored latents do not fit.
    """
    where = "the embedded digits" if data.source == "digits" else f"{key} {data.path}"
    if facts.size != model.input_size:
        raise DataError(f"model.input_size: {model.input_size}, but {where} holds {facts.kind} of size {facts.size}")
    if facts.channels != model.channels:
        raise DataError(
            f"model.channels: {model.channels}, but {where} holds {facts.kind} of {facts.channels} channels"
        )
    if model.classes and not 0 < facts.classes <= model.classes:
        labels = f"{facts.classes} classes; legal: {facts.classes}" if facts.classes else "no labels; legal: 0"
        raise DataError(f"model.classes: {model.classes}, but {where} holds {labels}")
    if data.flip and facts.kind == "latents" and not facts.mirrored:
        raise DataError(f"data.flip: True, but {where} holds no latents of mirrored images; prepare them with --flip")
    if facts.latent_scale is not None and facts.latent_scale != data.latent_scale:
        _log.warning("data.latent_scale: %g, but the VAE was made for %g", data.latent_scale, facts.latent_scale)


def _folder(data: DataConfig) -> Path:
    assert data.path is not None  # DataConfig refuses source shards without a path
    return Path(data.path)
