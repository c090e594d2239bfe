"""Copies between host memory and the device. Only this file chooses pinned memory, by the type of the device.

On CUDA the host waits in `Download.wait` and `PendingCopies.wait` only. On a CPU nothing is copied.
"""

from __future__ import annotations

import contextlib
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
    """Return the one stream of this process for copies to a device. torch keeps freed memory for the stream that used it."""
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


MAX_GAP = 1 << 18  # unused elements between two views that are copied together


@dataclass(frozen=True)
class CopyRun:
    """Elements of one storage that are copied at once: the source (n,), and (index, offset in it) of each view."""

    source: Tensor
    members: tuple[tuple[int, int], ...]


def copy_runs(views: Sequence[Tensor], indices: Sequence[int]) -> list[CopyRun]:
    """Return the fewest copies that hold the flat views with these indices: one for each stretch of a storage."""
    places = [(views[i].untyped_storage()._cdata, int(views[i].storage_offset()), i) for i in indices]
    stretches: list[list[tuple[int, int, int]]] = []
    end = 0
    for place in sorted(places):
        storage, offset, index = place
        if not stretches or stretches[-1][0][0] != storage or offset > end + MAX_GAP:
            stretches.append([])
            end = 0
        stretches[-1].append(place)
        end = max(end, offset + views[index].numel())
    return [_run(views, stretch) for stretch in stretches]


def _run(views: Sequence[Tensor], stretch: Sequence[tuple[int, int, int]]) -> CopyRun:
    first = stretch[0][1]
    end = max(offset + views[index].numel() for _, offset, index in stretch)
    source = views[stretch[0][2]].as_strided((end - first,), (1,), first)
    return CopyRun(source, tuple((index, offset - first) for _, offset, index in stretch))


@dataclass(frozen=True)
class PendingCopies:
    """Copies in host memory that have begun. `copied` is recorded after them. None: they have ended."""

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait until the host has the values."""
        if self.copied is not None:
            self.copied.synchronize()


class HostCopies:
    """Copies large state to the host, in pinned memory that is kept, with one copy for each flat tensor.

    On CUDA a stream of its own makes the copies. The kernels that follow wait for them, because they may change the state. The
    host does not wait.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def begin(self, views: Sequence[Tensor]) -> PendingCopies:
        """Begin to copy flat views (n,). Those in host memory are returned as they are.

        The copies of the call before are overwritten.
        """
        hosts = [view.detach() for view in views]
        away = [index for index, view in enumerate(hosts) if _is_away(view)]
        device = next((hosts[index].device for index in away if hosts[index].is_cuda), None)
        if device is not None and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        stream = self._stream if device is not None else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for number, run in enumerate(copy_runs(hosts, away)):
                buffer = self._buffer(number, run.source)
                buffer.copy_(run.source, non_blocking=True)
                for index, offset in run.members:
                    hosts[index] = buffer.narrow(0, offset, hosts[index].numel())
        if stream is None:
            return PendingCopies(tuple(hosts), None)
        copied = stream.record_event()
        torch.cuda.current_stream(device).wait_event(copied)
        return PendingCopies(tuple(hosts), copied)

    def _buffer(self, number: int, source: Tensor) -> Tensor:
        """Return host memory for the copy `number`, that of the call before if it has the size."""
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0))
        if self._buffers[number].shape != source.shape or self._buffers[number].dtype != source.dtype:
            self._buffers[number] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return self._buffers[number]


def _is_away(values: Tensor) -> bool:
    """Return True if values are not in host memory."""
    return values.device.type != "cpu"
