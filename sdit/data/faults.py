"""Errors of shards and samples that cannot be used. Their reasons are fixed because they are labels of a metric."""

from __future__ import annotations

from typing import Literal

from sdit.errors import DataError

ShardReason = Literal["missing", "size", "checksum", "archive", "forbidden_member", "count"]
SampleReason = Literal[
    "no_image",
    "no_label",
    "undecodable",
    "wrong_size",
    "wrong_channels",
    "non_finite",
    "bad_label",
]


class BadShard(DataError):
    """An error of a whole shard: none of its samples may be used."""

    def __init__(self, reason: ShardReason, shard: str, detail: str) -> None:
        super().__init__(reason, shard, detail)
        self.reason, self.shard, self.detail = reason, shard, detail

    def __str__(self) -> str:
        return f"{self.shard}: {self.detail} ({self.reason})"


class BadSample(DataError):
    """An error of one sample. The other samples of its shard may be used."""

    def __init__(self, reason: SampleReason, shard: str, key: str, detail: str) -> None:
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.detail} ({self.reason})"
