"""Why a shard or a sample cannot be used. The reasons are few and fixed: they become labels of a metric."""

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
    """A shard of which no sample may be used."""

    def __init__(self, reason: ShardReason, shard: str, detail: str) -> None:
        super().__init__(reason, shard, detail)
        self.reason, self.shard, self.detail = reason, shard, detail

    def __str__(self) -> str:
        return f"{self.shard}: {self.detail} ({self.reason})"


class BadSample(DataError):
    """A sample that may not be used; the rest of its shard is fine."""

    def __init__(self, reason: SampleReason, shard: str, key: str, detail: str) -> None:
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}: {self.detail} ({self.reason})"
