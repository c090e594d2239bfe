"""What a stage of the GPU check reports, and how it measures."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Dtype = torch.dtype
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Row:
    """One figure. `is_good` says whether it keeps the limit that `wanted` states; None: there is no limit."""

    name: str
    value: float | str
    unit: str = ""
    wanted: str = ""
    is_good: bool | None = None


@dataclass(frozen=True)
class Machine:
    """The device of the check. `is_tiny` replaces all sizes by the smallest ones, which test the code and measure nothing."""

    device: torch.device
    is_tiny: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def settle(self) -> None:
        """Wait until the device has done all work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The largest memory in use since `reset_peak`; on a CPU, that of the process since its start."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def milliseconds(self, function: Callable[[], Any], repeats: int) -> float:
        """The median time of a call, after two calls that are not counted."""
        times = []
        for _ in range(2 + (1 if self.is_tiny else repeats)):
            self.settle()
            started = time.perf_counter()
            function()
            self.settle()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times[2:])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of `exact`."""
    difference = found.detach().cpu().double() - exact.detach().cpu().double()
    return float(difference.norm() / exact.detach().cpu().double().norm())


def limited(name: str, value: float, unit: str, limit: float) -> Row:
    """A figure that must be at most `limit`."""
    return Row(name, value, unit, f"at most {limit:g}", value <= limit)
