"""The fields of a manifest. They are checked before anything in it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sdit.errors import CheckpointError

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    """A section of the manifest. Later versions may add fields."""

    model_config = ConfigDict(strict=True, extra="allow")


class _File(_Section):
    """A shard. In a file of one node, it begins at byte `start` of a file of `file_bytes`."""

    # without a path, so the file is in the folder
    name: str = Field(pattern=r"^(shard-[0-9]{5,}\.safetensors|node-[0-9]{5,}\.shards)$")
    size_bytes: Count
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")
    start: Count | None = None
    file_bytes: Count | None = None


class _Index(_Section):
    """Packed by `sdit/checkpoint/index.py`, which checks the rows."""

    kinds: list[str]
    shapes: dict[str, Annotated[list[Count], Field(max_length=64)]]
    count: Count
    ranges: str


class _Clock(_Section):
    images_seen: Count
    steps: Count
    left_out: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []


class _Speeds(_Section):
    all_to_all_bytes_per_second: Annotated[float, Field(gt=0)]
    gather_bytes_per_second: Annotated[float, Field(gt=0)]
    flops_per_second: Annotated[float, Field(gt=0)]
    transfer_seconds: Annotated[float, Field(gt=0)]


class _ExpertLayout(_Section):
    ranks: Annotated[int, Field(ge=1, lt=2**31)]
    place: list[list[Count]]
    at_hand: list[list[bool]]
    speeds: _Speeds | None = None
    token_place: list[list[Count]] = []
    token_counts: list[list[Count]] = []

    @model_validator(mode="after")
    def _fits(self) -> _ExpertLayout:
        if [len(row) for row in self.place] != [len(row) for row in self.at_hand] or len(set(map(len, self.place))) > 1:
            raise ValueError("place and at_hand have different shapes")
        if [len(row) for row in self.token_place] != [len(row) for row in self.token_counts]:
            raise ValueError("token_place and token_counts have different shapes")
        if len(set(map(len, self.token_place))) > 1:
            raise ValueError("token_place has rows of different lengths")
        for key, rows in (("place", self.place), ("token_place", self.token_place)):
            if any(rank >= self.ranks for row in rows for rank in row):
                raise ValueError(f"{key} holds a rank beyond {self.ranks - 1}")
        return self


class _Body(_Section):
    files: Annotated[list[_File], Field(min_length=1)]
    clock: _Clock
    config: dict[str, Any]
    prior_columns: list[Count] | None = None
    prior_every_steps: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    expert_layout: _ExpertLayout | None = None
    expert_parallel: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    written_by: dict[str, Any] = {}
    length_images: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    index: _Index | None = None

    @model_validator(mode="after")
    def _agrees(self) -> _Body:
        ends = dict[str, int]()
        for file in self.files:
            if (file.start or 0) != ends.get(file.name, 0):
                raise ValueError("files names a shard twice" if file.start is None else f"{file.name} has a gap")
            ends[file.name] = (file.start or 0) + file.size_bytes
        for file in self.files:
            if ends[file.name] != (file.size_bytes if file.file_bytes is None else file.file_bytes):
                raise ValueError(f"{file.name} has not the size of its shards")
        if self.prior_columns is not None and sorted(self.prior_columns) != list(range(len(self.prior_columns))):
            raise ValueError("prior_columns is not a permutation")
        return self


def check_manifest(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the body of the manifest at `path` after checking it. The section `config` has its own schema.

    Raises: CheckpointError: if a field is missing or has the wrong type, a shard name leads out of the folder, a count is
        negative, or a number is not finite. The message names the field.
    """
    try:
        _Body.model_validate(body)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(name) for name in problem["loc"]) or "body"
        text = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in ("missing", "value_error") else f": {_short(problem['input'])}"
        raise CheckpointError(f"{path}: {field}{found} is not legal ({text[0].lower()}{text[1:]})") from None
    for field, number in _numbers({key: value for key, value in body.items() if key != "config"}, ""):
        if not math.isfinite(number):
            raise CheckpointError(f"{path}: {field}: {number} is not legal; legal: finite numbers")
    return body


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield each float of a JSON value with its dotted name. The reader has limited the depth."""
    if isinstance(value, float):
        yield name, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _numbers(child, f"{name}.{key}" if name else str(key))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
