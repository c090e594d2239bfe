"""Copies between host memory and the device. Only this file chooses pinned memory, by the type of the device.

On CUDA the host waits in `Download.wait` only. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
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


@dataclass(frozen=True)
class PendingUpload:
    """A copy that has begun. `copied` is recorded after it in the stream of the copy. None: the copy has ended."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, ...]:
        """Return the tensors on the device. The present stream waits for the copy, the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            for tensor in self.tensors:
                tensor.record_stream(stream)  # its memory belongs to the stream of the copy
        return self.tensors


class UploadStream:
    """Begins copies to the device in a stream of its own, so that no copy delays training. Threads can share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, arrays: Sequence[np.ndarray]) -> PendingUpload:
        """Begin to copy arrays. On a CPU the tensors share the memory of the arrays."""
        hosts = [torch.from_numpy(array) for array in arrays]
        if self._stream is None:
            return PendingUpload(tuple(upload(host, self._device) for host in hosts), None)
        torch.cuda.set_device(self._device)  # of this thread, which otherwise opens a context on the first GPU
        with torch.cuda.stream(self._stream):
            return PendingUpload(tuple(upload(host, self._device) for host in hosts), self._stream.record_event())


@cache
def upload_stream(device: torch.device) -> UploadStream:
    """Return the one stream of this process for copies to the device. torch keeps freed memory for the stream that used it."""
    return UploadStream(device)


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
