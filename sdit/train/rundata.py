"""The data of a run, compared with its model, with its held-out images and with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdit.config import Config, DataConfig
from sdit.data.classes import class_differences
from sdit.data.identity import DataIdentity, describe_change, stored_identity
from sdit.data.latent_stats import LatentStatistics
from sdit.distributed.comm import Comm
from sdit.errors import ConfigError, DataError


class Note(NamedTuple):
    """What the user allowed, as an event of the run."""

    kind: str
    text: str


@dataclass(frozen=True)
class RunData:
    """Which images a run trains on, and on which ones it measures the held-out loss."""

    training: DataIdentity
    held_out: DataIdentity | None

    def stored(self) -> dict[str, Any]:
        """The fields of a checkpoint's manifest, as JSON types."""
        held_out = None if self.held_out is None else self.held_out.model_dump(mode="json")
        return {"data": self.training.model_dump(mode="json"), "held_out_data": held_out}


def was_accepted(
    manifest: Mapping[str, Any] | None, where: str, training: DataIdentity, held_out: DataIdentity | None = None
) -> bool:
    """Whether the run already went on with these data up to its checkpoint at `where`: then it continues, with a note.

    That is also so for a run that a version began which stored no data in its checkpoints.
    """
    if manifest is None:
        return False
    if manifest.get("data") is None:
        return True
    pairs = [("data", training)] + ([("held_out_data", held_out)] if held_out is not None else [])
    stored = [(stored_identity(manifest.get(key), where), now) for key, now in pairs]
    return all(before is not None and before.fingerprint == now.fingerprint for before, now in stored)


def check_classes(config: Config, training: DataIdentity, accepted: bool) -> list[Note]:
    """Compare the number of classes with the model's.

    Raises: DataError if the model has labels that no image bears, unless the config allows it or it was `accepted`.
    """
    wanted, held, where = config.model.classes, training.classes, _where(config.data)
    notes = []
    if wanted and training.empty_classes:
        empty = ", ".join(map(training.labels.describe, training.empty_classes))
        notes.append(Note("empty_classes", f"{where} holds no image of the labels {empty}; they are never sampled"))
    if wanted <= held:
        return notes
    fact = f"model.classes: {wanted}, but {where} holds {held} classes"
    labels = f"label {held}" if wanted == held + 1 else f"labels {held}..{wanted - 1}"
    if not config.data.allow_unused_classes and not accepted:
        raise DataError(
            f"{fact}: {labels} would never be trained; legal: model.classes {held}, or data.allow_unused_classes: true"
        )
    return [*notes, Note("unused_classes", f"{fact}; {labels}: never trained and never sampled")]


def check_held_out(config: Config, training: DataIdentity, held_out: DataIdentity, accepted: bool) -> list[Note]:
    """Compare the held-out images with the training images; labels matter to a conditional model only.

    Raises: DataError if they are of another kind, or if their classes differ, unless the config allows it or it was
    `accepted`.
    """
    path, where = config.validation.path, _where(config.data)
    if held_out.kind != training.kind:
        raise DataError(f"validation.path: {path} holds {held_out.kind}, but {where} holds {training.kind}")
    notes = []
    if held_out.fingerprint == training.fingerprint:
        notes.append(Note("held_out_is_training", f"validation.path: {path} holds the training images themselves"))
    differences = class_differences(held_out.labels, training.labels) if config.model.classes else ""
    if not differences:
        return notes
    fact = f"validation.path: {path} does not hold the classes of {where}: {differences}"
    if not config.validation.allow_other_classes and not accepted:
        raise DataError(f"{fact}; legal: the same classes in the same order, or validation.allow_other_classes: true")
    return [*notes, Note("other_held_out_classes", fact)]


def check_unchanged(config: Config, data: RunData, manifest: Mapping[str, Any], where: str) -> list[Note]:
    """Compare the data with those of the checkpoint at `where`, by content: the same images may be in another folder.

    Raises:
        DataError: other training images or classes, and the config does not allow the change.
        CheckpointError: what the manifest says of the data cannot be understood.
    """
    notes = []
    before = stored_identity(manifest.get("data"), where)
    _check_same_normalisation(None if before is None else before.latent_stats, data.training.latent_stats, where)
    change = "" if before is None else describe_change(before, data.training)
    if change:
        fact = f"{_where(config.data)} does not hold the images of the checkpoint {where}: {change}"
        if not config.data.allow_change:
            raise DataError(f"{fact}; legal: the same images, another run_dir, or data.allow_change: true")
        notes.append(Note("data_changed", fact))
    held_out_before = stored_identity(manifest.get("held_out_data"), where)
    if held_out_before is not None and data.held_out is not None:
        change = describe_change(held_out_before, data.held_out)
        if change:
            text = f"validation.path: {config.validation.path}: {change}; held-out losses before cannot be compared"
            notes.append(Note("held_out_data_changed", text))
    return notes


def _check_same_normalisation(before: LatentStatistics | None, now: LatentStatistics | None, where: str) -> None:
    """Raises: ConfigError if the run would see its latents normalised by other statistics than before."""
    if before != now:
        had, has = (f"{each.describe()}" if each is not None else "no statistics" for each in (before, now))
        raise ConfigError(
            f"data.latent_stats: {has}, but the checkpoint {where} was trained with {had}; "
            "legal: the same statistics, or another run_dir"
        )


def check_same_on_all_ranks(data: RunData, comm: Comm) -> None:
    """Raises: DataError, on every rank, if a path holds other images on one rank's host than on rank 0's."""
    mine = [data.training.fingerprint, "" if data.held_out is None else data.held_out.fingerprint]
    first, *others = comm.gather(mine)
    for rank, theirs in enumerate(others, start=1):
        for key, one, other in zip(("data.path", "validation.path"), first, theirs, strict=True):
            if one != other:
                raise DataError(
                    f"{key}: holds other images on rank {rank} than on rank 0; legal: the same on all hosts"
                )


def _where(data: DataConfig) -> str:
    return "data.source digits" if data.source == "digits" else f"data.path {data.path}"
