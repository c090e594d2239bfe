"""Copies between host memory and the device. Only this file chooses pinned memory, by the type of the device.

On CUDA the host waits in `Download.wait` only. On a CPU nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device. They are usually in host memory. The host does not wait for the copy.

    On CUDA the copy is made from pinned memory, because a copy from pageable memory stops the host. torch does not use the
    pinned memory again before the copy has ended.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Download:
    """A copy of `values` to host memory that has begun. `wait` returns it."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._copied = values, None
        if values.device.type == "cuda":
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """Return the values in host memory. The host waits until the device has computed and copied them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
