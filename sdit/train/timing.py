"""Where a rank's time goes, part by part, and how much memory it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PARTS = ("data_wait", "forward_backward", "optimizer", "checkpoint", "sample", "validation")
PAUSES = ("checkpoint", "sample", "validation")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class StepTimes:
    """Seconds of each part since the last `take`, as the host sees them: kernels still under way count where it waits."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as part `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """The timing keys of metrics.jsonl; begins anew."""
        keys = {f"{name}_seconds": seconds for name, seconds in self._seconds.items()}
        keys["pause_seconds"] = sum(self._seconds[name] for name in PAUSES)
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return keys


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes this process holds: `resident` in the host's memory, `device` allocated on the GPU (0 without one)."""
    on_gpu = device.type == "cuda"
    return {"resident": _resident_bytes(), "device": torch.cuda.memory_allocated(device) if on_gpu else 0}


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except FileNotFoundError:  # not Linux
        return 0
    return int(pages) * _PAGE_BYTES
