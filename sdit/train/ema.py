"""The averaged weights, fp32 and sharded like the optimizer state: each rank averages the shards it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdit.distributed.shards import Shard


class Ema:
    """`values[i]` (numel,) fp32 is the average of `shards[i].master`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self._masters: list[Tensor] = [shard.master for shard in shards]  # views, which DeepSpeed updates in place
        self.values = [master.clone() for master in self._masters]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """values <- decay * values + (1 - decay) * masters."""
        torch._foreach_lerp_(self.values, self._masters, 1.0 - decay)
