"""Opens the training images and the held-out images of a run, and compares them with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdit.checkpoint.store import Found
from sdit.config import Config, DataConfig
from sdit.data.dataset import check_fit, open_dataset
from sdit.data.identity import DataIdentity
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


def open_data(
    config: Config, comm: Comm, training: DataIdentity, found: Found | None
) -> tuple[RunData, Loader | None, list[Note]]:
    """Open the held-out images and compare all data; return what the user allowed to differ. Raises: DataError."""
    manifest, where = (None, "") if found is None else (found.manifest, str(found.folder))
    notes = check_classes(config, training, was_accepted(manifest, where, training))
    held_out, more = open_held_out(config, training, comm.world, manifest, where)
    data = RunData(training, None if held_out is None else held_out.identity)
    check_same_on_all_ranks(data, comm)
    if manifest is not None:
        more += check_unchanged(config, data, manifest, where)
    return data, held_out, notes + more


def open_held_out(
    config: Config, training: DataIdentity, ranks: int, manifest: Mapping[str, Any] | None, where: str
) -> tuple[Loader | None, list[Note]]:
    """The loader of the held-out images, and what there is to say of them; None where the config asks for none.

    Raises: DataError if they do not fit the model or the training images; see `check_held_out`.
    """
    validation = config.validation
    if validation.every_images is None or validation.path is None:
        return None, []
    data = DataConfig(
        source="shards", path=validation.path, workers=config.data.workers, latent_scale=config.data.latent_scale
    )
    dataset = open_dataset(data)
    identity = DataIdentity.of(dataset.facts, dataset.fingerprint)
    notes = check_held_out(config, training, identity, was_accepted(manifest, where, training, identity))
    check_fit(dataset.facts, data, config.model, "validation.path")
    return Loader(dataset, data, validation.seed, ranks, labelled=config.model.classes > 0), notes
