"""Float64 tables over timesteps, indexed by a batch of t on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class DeviceTables:
    """Rows of float64 (T,), copied to a device once. They are not module buffers, which `.bfloat16()` would round."""

    def __init__(self, *rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(np.stack(rows))
        self._on_device: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return the float32 values (B,) of each row at timesteps `t` (B,) int64, without a device synchronisation."""
        rows = self._on_device.get(t.device)
        if rows is None:
            rows = self._on_device[t.device] = self._rows.to(t.device)
        return rows[:, t].float().unbind()
