"""A device that cannot be read: `meta` tensors stand in for those of a GPU.

A meta tensor has no values. `.item()`, `.cpu()`, `nonzero` and a boolean test of it raise. On a GPU each of them makes the host
wait for the device. `Download.wait`, the only place where sdit waits on purpose, is replaced and recorded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdit.transfers import Download

META = torch.device("meta")


@dataclass
class Waits:
    """What the host did, in order: `forward`, `backward`, and the name of the function of each wait.

    `pageable` names the functions that copied host memory to the device without `transfers.upload`.
    """

    events: list[str] = field(default_factory=list)
    pageable: list[str] = field(default_factory=list)


class _HostCopies(TorchDispatchMode):
    """Records copies from the host to the device that are not made by `transfers.upload`."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if source is not None and args[source].device.type == "cpu" and result.device == META:
            names = list(_callers())
            if "upload" not in names:
                self._found.append(names[0] if names else "a test")
        return result


def _callers() -> Iterator[str]:
    """The qualified names of the functions of sdit on the stack, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if "/sdit/" in frame.f_code.co_filename:
            yield frame.f_code.co_qualname
        frame = frame.f_back  # type: ignore[assignment]


def recorded(values: Tensor) -> Tensor:
    """Values in host memory like `values`: a routing table of shape (2, depth, T, k), or zeros."""
    if values.dim() != 4:
        return torch.zeros(values.shape, dtype=values.dtype)
    _, depth, tasks, top_k = values.shape
    first = top_k * (torch.arange(tasks) // 8 % 2)
    experts = (first[:, None] + torch.arange(top_k)).expand(depth, tasks, top_k)  # the first experts, or the next ones
    return torch.stack([experts.float(), torch.full(experts.shape, 1.0 / top_k)])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    found = Waits()

    def wait(download: Download) -> Tensor:
        found.events.append(sys._getframe(1).f_code.co_qualname)
        return recorded(download._host)

    monkeypatch.setattr(Download, "wait", wait)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with _HostCopies(found.pageable):
        yield found
