"""Copies arrays to the device. On a GPU this uses pinned memory and a stream of its own, so that no copy delays training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Upload:
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


class Uploader:
    """Begins copies to the device. Several threads can use it together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, arrays: Sequence[np.ndarray]) -> Upload:
        """Begin to copy arrays. On a CPU the tensors share the memory of the arrays."""
        hosts = [torch.from_numpy(array) for array in arrays]
        if self._stream is None:
            return Upload(tuple(host.to(self._device) for host in hosts), None)
        with torch.cuda.stream(self._stream):
            # torch keeps freed pinned memory for the next copies. It waits until the copy that reads it has ended.
            tensors = tuple(host.pin_memory().to(self._device, non_blocking=True) for host in hosts)
            return Upload(tensors, self._stream.record_event())
