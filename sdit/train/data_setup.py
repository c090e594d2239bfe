"""Opens the training images and the held-out images of a run, and compares them with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdit.checkpoint.find import Found
from sdit.config import Config, DataConfig
from sdit.data.dataset import check_fit, is_tar_index, open_dataset
from sdit.data.identity import DataIdentity, trained_classes
from sdit.data.loader import Loader
from sdit.distributed.comm import Comm
from sdit.train.rundata import (
    Note,
    RunData,
    check_classes,
    check_held_out,
    check_same_on_all_ranks,
    check_unchanged,
    was_accepted,
)
from sdit.train.sampling import grid_labels


@dataclass(frozen=True)
class OpenedData:
    """The data of a run, compared with its config and its checkpoint.

    `held_out` loads the held-out images; None if the config asks for none. `grid_labels` (rows * columns,) int64 are
    the labels of the sample grid. `notes` say what the user allowed to differ.
    """

    data: RunData
    held_out: Loader | None
    grid_labels: np.ndarray
    notes: Sequence[Note]


@contextmanager
def open_data(config: Config, comm: Comm, training: DataIdentity, found: Found | None) -> Iterator[OpenedData]:
    """Open the held-out images and compare all data. Close the held-out images at the end of the `with`.

    Raises:
        DataError: the data do not fit one another, the config or the checkpoint.
        ConfigError: sample.labels names a class that is not trained.
    """
    manifest, where = (None, "") if found is None else (found.manifest, str(found.folder))
    notes = check_classes(config, training, was_accepted(manifest, where, training))
    held_out, more = open_held_out(config, training, comm.world, manifest, where)
    data = RunData(training, None if held_out is None else held_out.identity)
    check_same_on_all_ranks(data, comm)
    if manifest is not None:
        more += check_unchanged(config, data, manifest, where)
    with held_out or nullcontext():
        labels = grid_labels(config.sample, trained_classes(config.model, training))
        yield OpenedData(data, held_out, labels, notes + more)


def open_held_out(
    config: Config, training: DataIdentity, ranks: int, manifest: Mapping[str, Any] | None, where: str
) -> tuple[Loader | None, list[Note]]:
    """The loader of the held-out images, and what there is to say of them; None where the config asks for none.

    Raises: DataError if they do not fit the model or the training images; see `check_held_out`.
    """
    validation = config.validation
    if validation.every_images is None or validation.path is None:
        return None, []
    source: Literal["shards", "webdataset"] = "webdataset" if is_tar_index(Path(validation.path)) else "shards"
    data = DataConfig(
        source=source, path=validation.path, workers=config.data.workers, latent_scale=config.data.latent_scale
    )
    dataset = open_dataset(data, config.model)
    identity = DataIdentity.of(dataset.facts, dataset.fingerprint)
    notes = check_held_out(config, training, identity, was_accepted(manifest, where, training, identity))
    check_fit(dataset.facts, data, config.model, "validation.path")
    stats = training.latent_stats  # held-out latents are normalised as those of training
    return Loader(dataset, data, validation.seed, ranks, config.model.classes > 0, stats), notes
