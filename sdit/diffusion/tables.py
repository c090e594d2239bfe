"""Float64 tables over timesteps, read by a batch of t on any device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class DeviceTables:
    """Rows of float64 (T,), copied to a device once; no module buffers, which `.bfloat16()` would round."""

    def __init__(self, *rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(np.stack(rows))
        self._on_device: dict[torch.device, Tensor] = {}

    def at(self, t: Tensor) -> tuple[Tensor, ...]:
        """Each row's float32 values (B,) at integer timesteps `t` (B,), without waiting for the device."""
        rows = self._on_device.get(t.device)
        if rows is None:
            rows = self._on_device[t.device] = self._rows.to(t.device)
        return rows[:, t].float().unbind()
