"""The identity of a run's training data: a fingerprint and the classes. Checkpoints and exported files store it."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sdit.config import ModelConfig
from sdit.data.classes import Classes, class_differences
from sdit.data.index import DatasetFacts
from sdit.data.latent_stats import LatentStatistics
from sdit.errors import CheckpointError

SHOWN_DIGITS = 12  # of a fingerprint in a message


class DataIdentity(BaseModel):
    """The `fingerprint` of a data set with its number of images and its classes. Equal fingerprints mean equal images.

    `latent_stats` normalise the latents of the run. Unknown fields, which later versions may add, are ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    fingerprint: str = Field(min_length=1)
    kind: str
    total: int = Field(ge=1)
    classes: int = Field(ge=0)
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] = ()
    latent_stats: LatentStatistics | None = None

    @model_serializer(mode="wrap")
    def _without_null(self, serialise: SerializerFunctionWrapHandler) -> Any:
        """Leave out `latent_stats` if it is null, as older versions did."""
        values = serialise(self)
        if isinstance(values, dict) and values.get("latent_stats", 0) is None:
            del values["latent_stats"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> DataIdentity:
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.classes} classes")
        if self.empty_classes and not set(self.empty_classes) < set(range(self.classes)):
            raise ValueError(f"empty_classes: {self.empty_classes}; legal: some of the labels 0..{self.classes - 1}")
        return self

    @classmethod
    def of(cls, facts: DatasetFacts, fingerprint: str, latent_stats: LatentStatistics | None = None) -> DataIdentity:
        """Return the identity of an open data set whose latents are normalised by `latent_stats`."""
        shared = facts.model_dump(include={"kind", "total", "classes", "class_names", "empty_classes"})
        return cls(fingerprint=fingerprint, latent_stats=latent_stats, **shared)

    @property
    def labels(self) -> Classes:
        """The classes: their number, their names and the labels without images."""
        return Classes(self.classes, self.class_names, self.empty_classes)

    def describe(self) -> str:
        """Return `1797 images of 10 classes (fingerprint 1a2b3c4d5e6f)`."""
        classes = f"of {self.classes} classes" if self.classes else "without labels"
        return f"{self.total} {self.kind} {classes} (fingerprint {self.fingerprint[:SHOWN_DIGITS]})"


def trained_classes(model: ModelConfig, data: DataIdentity | None) -> Classes:
    """Return the classes that a model was trained on. If its data are unknown, use the number of classes of its config."""
    if data is None or not 0 < data.classes <= model.classes:
        return Classes(model.classes)
    return data.labels


def stored_identity(value: Any, where: str) -> DataIdentity | None:
    """Return the identity in a manifest or an exported file, or None if an older version wrote it without one.

    Raises: CheckpointError: if the identity is not valid. The message names `where`.
    """
    if value is None:
        return None
    try:
        return DataIdentity.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(["data", *map(str, first["loc"])])
        raise CheckpointError(f"{where}: {key}: {first['msg']}") from None


def describe_change(before: DataIdentity, now: DataIdentity) -> str:
    """Return the change from `before` to `now` in one line. Return an empty string if the images are the same."""
    if before.fingerprint == now.fingerprint:
        return ""
    differences = class_differences(now.labels, before.labels)
    return f"{before.describe()} -> {now.describe()}" + (f"; {differences}" if differences else "")
