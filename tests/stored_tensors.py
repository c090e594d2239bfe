"""Reads whole logical tensors of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from sdit.checkpoint.shard_set import ShardSet


def stored_tensor(shards: ShardSet, name: str) -> Tensor:
    """Return a logical tensor, float32 in its logical shape. `read_into` raises if an element is missing."""
    value = torch.empty(shards.shapes[name])
    shards.read_into(name, 0, value.view(-1))
    return value
