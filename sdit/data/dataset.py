"""The data sets that the loader reads: a prepared folder, or the digits in memory. Both consist of shards."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdit.config import DataConfig, ModelConfig
from sdit.data.classes import Classes
from sdit.data.decode import DecodedSamples, Sample
from sdit.data.digits import DIGITS_FACTS, digits
from sdit.data.index import DatasetFacts, read_index
from sdit.data.latent_stats import LatentStatistics, read_latent_stats
from sdit.data.shards import TarShard, read_shard
from sdit.data.tar_index import TAR_INDEX_NAME, read_tar_index
from sdit.data.tars_in_place import OpenTar, TarsInPlace
from sdit.errors import ConfigError, DataError

DIGITS_PER_SHARD = 256
_log = logging.getLogger(__name__)


class PreparedFolder:
    """A data set in a folder of tar shards with an index.json."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder)
        self.facts = index.facts
        self.counts = tuple(record.samples for record in index.shards)
        self.fingerprint = index.fingerprint
        self._records = index.shards
        self._folder = folder

    def open(self, shard: int) -> TarShard:
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

    def open(self, shard: int) -> DigitsShard:
        return DigitsShard(self._starts[shard], self.counts[shard])


class DigitsShard:
    """Some of the digits."""

    def __init__(self, start: int, count: int) -> None:
        pixels, labels = digits()
        samples = slice(start, start + count)
        self.decoded = DecodedSamples(pixels[samples], labels[samples], np.arange(count))

    def __len__(self) -> int:
        return len(self.decoded.row)

    def sample(self, member: int) -> Sample:
        return Sample(self.decoded.values[member], int(self.decoded.labels[member]))


# An open shard. `decoded` holds the samples that were decoded when it was opened, and is None if each is decoded when it is read.
# `sample` raises BadSample if a sample cannot be used, and BadShard if the file changed after it was opened.
Shard = TarShard | OpenTar | DigitsShard

# A data set of shards with `counts` samples each. Data sets with equal `fingerprint` hold the same samples in the same order.
# `open` raises BadShard if no sample of the shard can be used.
Dataset = PreparedFolder | TarsInPlace | EmbeddedDigits


def open_dataset(data: DataConfig, model: ModelConfig | None = None) -> Dataset:
    """Return the data set that the configuration names. The source webdataset needs the `model`, whose size it takes.

    Raises: DataError: if the data set does not exist or its index is not valid.
    """
    if data.source == "webdataset":
        assert model is not None
        if model.channels not in (1, 3):
            raise DataError(
                f"model.channels: {model.channels}, but data.source webdataset holds images; legal: 1 (grey), 3 (RGB)"
            )
        return TarsInPlace(_folder(data), model.input_size, model.channels)
    return EmbeddedDigits() if data.source == "digits" else PreparedFolder(_folder(data))


def is_tar_index(folder: Path) -> bool:
    """Return True if `sdit prepare index` wrote the folder."""
    return (folder / TAR_INDEX_NAME).exists()


def dataset_facts(data: DataConfig) -> DatasetFacts:
    """Return the facts of a data set without reading a sample. The source webdataset has no size of its own.

    Raises: DataError: if the data set does not exist or its index is not valid.
    """
    assert data.source != "webdataset"
    return DIGITS_FACTS if data.source == "digits" else read_index(_folder(data)).facts


def data_kind(data: DataConfig) -> Literal["images", "latents"] | None:
    """Return the kind of the samples, or None if the data set cannot be read."""
    try:
        return "images" if data.source == "webdataset" else dataset_facts(data).kind
    except (DataError, OSError):
        return None


def data_classes(data: DataConfig) -> Classes:
    """Return the classes of a data set, none if it cannot be read."""
    try:
        facts = read_tar_index(_folder(data)) if data.source == "webdataset" else dataset_facts(data)
    except (DataError, OSError):
        return Classes(0)
    return Classes(facts.classes, facts.class_names, facts.empty_classes)


def data_recipe(data: DataConfig) -> dict[str, Any]:
    """Return the recipe of a prepared folder. Return an empty dict for the digits or if the folder cannot be read."""
    try:
        return read_index(_folder(data)).recipe if data.source == "shards" else {}
    except (DataError, OSError):
        return {}


def latent_stats_of(data: DataConfig, facts: DatasetFacts | None = None) -> LatentStatistics | None:
    """Return the statistics that the configuration names, None if it names none. `facts` are those of the data set.

    Raises:
        ConfigError: if the data set or the file holds none.
        DataError: if the data set cannot be read.
    """
    if data.latent_stats is None:
        return None
    if data.latent_stats == "index":
        stored = (facts or dataset_facts(data)).latent_stats
        if stored is None:
            raise ConfigError(
                f"data.latent_stats: index, but {data.path} holds no statistics; legal: null, a file, or the command of "
                "sdit prepare latents again, which adds them"
            )
        return stored
    if facts is not None and facts.kind != "latents":
        raise ConfigError(f"data.latent_stats: {data.latent_stats}, but {data.path} holds images; legal: null")
    return read_latent_stats(Path(data.latent_stats))


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
    if data.latent_stats is None and facts.latent_scale is not None and facts.latent_scale != data.latent_scale:
        _log.warning("data.latent_scale: %g, but the VAE was made for %g", data.latent_scale, facts.latent_scale)


def _folder(data: DataConfig) -> Path:
    assert data.path is not None  # DataConfig refuses source shards without a path
    return Path(data.path)
