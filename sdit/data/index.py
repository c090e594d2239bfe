"""index.json: the contents of a folder of shards, with the size and the checksum of each shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdit.checked_files import NotRegularFile, read_regular
from sdit.data.latent_stats import LatentStatistics
from sdit.errors import DataError
from sdit.files import replacing

INDEX_NAME = "index.json"
Model = TypeVar("Model", bound=BaseModel)


class StrictRecord(BaseModel):
    """A record without fields that are not declared, and without conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatasetFacts(StrictRecord):
    """The properties that all samples of a data set share."""

    kind: Literal["images", "latents"]
    total: int = Field(ge=1, description="samples, each read once per epoch")
    channels: int = Field(ge=1, description="channels of an image or of a latent")
    size: int = Field(ge=1, description="height = width in pixels or latent cells")
    classes: int = Field(ge=0, description="labels are 0..classes-1; 0: unlabelled")
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] = Field(default=(), description="labels that no sample has, on purpose")
    mirrored: bool = Field(default=False, description="latents: moments of the mirrored image are stored as well")
    latent_scale: float | None = Field(default=None, description="latents: the factor that the VAE's authors recommend")
    latent_stats: LatentStatistics | None = Field(default=None, description="latents: mean and std of each channel")

    @model_validator(mode="after")
    def _consistent(self) -> DatasetFacts:
        if self.kind == "images" and self.channels not in (1, 3):
            raise ValueError(f"channels: {self.channels}; legal for images: 1 (grey), 3 (RGB)")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.classes} classes")
        if self.empty_classes and not set(self.empty_classes) < set(range(self.classes)):
            raise ValueError(f"empty_classes: {self.empty_classes}; legal: some of the labels 0..{self.classes - 1}")
        return self


class FileRecord(StrictRecord):
    """One file of samples: name, size in bytes, checksum and number of samples."""

    name: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(ge=1)


class ShardRecord(FileRecord):
    """One shard as it was written. Its name has no folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar$")


class DatasetIndex(StrictRecord):
    """The contents of index.json.

    `recipe` says what the folder was made from. A preparation continues only if its recipe is the same.
    """

    version: Literal[1] = 1
    facts: DatasetFacts
    recipe: dict[str, Any]
    shards: tuple[ShardRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> DatasetIndex:
        samples = sum(shard.samples for shard in self.shards)
        if samples != self.facts.total:
            raise ValueError(f"facts.total: {self.facts.total}, but the shards hold {samples} samples")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("shards: a name occurs twice")
        return self

    @property
    def fingerprint(self) -> str:
        """A sha256 of the kind of the samples, their classes in order, and the checksums of all shards in order.

        It does not depend on the location of the folder, and no shard is read. Equal fingerprints give the same run.
        """
        content = self.facts.model_dump(include={"kind", "channels", "size", "classes", "class_names"})
        content["shards"] = [(shard.sha256, shard.samples) for shard in self.shards]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> DatasetIndex:
    """Return the index of a prepared folder.

    Raises: DataError: if the folder has no index, or the index is not valid.
    """

    def how_to_write() -> str:
        if any(folder.glob("*.tar")):
            return f"its preparation did not finish; give the same command, sdit prepare ... with --out {folder} again"
        return f"run: sdit prepare <source> --out {folder}"

    return read_json_model(folder / INDEX_NAME, DatasetIndex, how_to_write, "prepare the folder again")


def read_json_model(path: Path, kind: type[Model], how_to_write: Callable[[], str], how_to_mend: str) -> Model:
    """Return the object of type `kind` in a JSON file.

    Raises: DataError: if the file is missing (then the message ends with `how_to_write()`), cannot be read, or is not valid
        (then it ends with `how_to_mend`).
    """
    try:
        return kind.model_validate_json(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file; {how_to_write()}") from None
    except (NotRegularFile, PermissionError) as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}: {where}: {first['msg']}; {how_to_mend}") from None


def write_index(folder: Path, index: DatasetIndex) -> None:
    """Write index.json atomically. It is written last, so a folder with an index is complete."""
    # Older versions refuse these fields.
    unused = {name for name in ("empty_classes", "latent_stats") if not getattr(index.facts, name)}
    with replacing(folder / INDEX_NAME) as file:
        file.write(index.model_dump_json(indent=1, exclude={"facts": unused} if unused else None).encode() + b"\n")
