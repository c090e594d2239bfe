"""The step timer: seconds of each phase on the host, and the work of a rank before it waits for others. Memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sdit.train.record import PHASES

PAUSES = ("checkpoint", "sample", "validation")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class StepTimer:
    """Times one rank's steps.

    A phase counts the host's seconds: kernels that still run count where the host waits for them. Work counts loading and
    forward passes, so that slow ranks show: in backward a rank waits for the others. With sharded experts, a forward pass
    also has waits for transfers. On a GPU the work of a step is known when its kernels have run. The ranks therefore compare
    the work of the steps before.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._started = time.perf_counter()
        self._work_steps, self._work_seconds = 0, 0.0  # of the steps that have ended since the ranks were compared
        self._step_seconds = 0.0  # work of the present step
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin_step(self) -> None:
        """Start the clock of `step_seconds`."""
        self._started = time.perf_counter()

    @property
    def step_seconds(self) -> float:
        """Seconds since `begin_step`."""
        return time.perf_counter() - self._started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as the phase `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    @contextmanager
    def host_work(self) -> Iterator[None]:
        """Count what runs inside as work of the host, such as loading data."""
        started = time.perf_counter()
        yield
        self._step_seconds += time.perf_counter() - started

    @contextmanager
    def device_work(self) -> Iterator[None]:
        """Count the kernels that are launched inside as work. On a GPU its own clock is read, after the step."""
        if not self._on_gpu:
            with self.host_work():
                yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def end_step(self) -> None:
        """Count a step that was taken. Its kernels have run."""
        on_device = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._events.clear()
        self._work_seconds += self._step_seconds + on_device
        self._work_steps, self._step_seconds = self._work_steps + 1, 0.0

    def take_phases(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, by the names of `StepRecord`, and count from zero."""
        seconds = {f"{name}_seconds": spent for name, spent in self._seconds.items()}
        seconds["pause_seconds"] = sum(self._seconds[name] for name in PAUSES)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds

    @property
    def work_seconds(self) -> float:
        """Mean work of the steps that have ended since `forget_work`, in seconds. It is 0 if none has ended."""
        return self._work_seconds / max(1, self._work_steps)

    def forget_work(self) -> None:
        """Count the work of ended steps from zero."""
        self._work_steps, self._work_seconds = 0, 0.0


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Return the bytes of this process: `resident` in host memory, `device` allocated on the GPU (0 without one).

    With a GPU, `device_peak` is the most that was allocated since the start, and `device_reserved` what torch's allocator
    holds. torch collects all its statistics for them, so that only logged steps have them.
    """
    if device.type != "cuda":
        return {"resident": _resident_bytes(), "device": 0}
    found = torch.cuda.memory_stats(device)
    kinds = {
        "device": "allocated_bytes.all.current",
        "device_peak": "allocated_bytes.all.peak",
        "device_reserved": "reserved_bytes.all.current",
    }
    return {"resident": _resident_bytes()} | {kind: int(found.get(name, 0)) for kind, name in kinds.items()}


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except FileNotFoundError:  # not Linux
        return 0
    return int(pages) * _PAGE_BYTES
