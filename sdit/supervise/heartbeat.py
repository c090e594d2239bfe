"""The heartbeat of a rank: memory that it shares with its supervisor.

The supervisor can always read it, even if the rank hangs.
"""

from __future__ import annotations

import enum
import mmap
import os
import signal
import struct
import tempfile
import threading
from dataclasses import dataclass

MEMORY_BYTES = 8192
ALIVE_SECONDS = 0.5
LAUNCHER_GONE, FOLDER_MOVED = 254, 255  # no signals have these numbers
REASONS = {LAUNCHER_GONE: "its launcher is gone", FOLDER_MOVED: "the run folder is no longer at its path"}
_STOP = struct.Struct("<B")  # each field has one writer
_PROGRESS = struct.Struct("<BQQ")
_ALIVE = struct.Struct("<Q")
_ERROR = struct.Struct("<BH")
_STOP_AT, _PROGRESS_AT, _ALIVE_AT, _ERROR_AT = 0, 64, 128, 192
_TEXT_AT = 256


class Phase(enum.IntEnum):
    """The current activity of a rank. Each phase has a deadline."""

    START = 0
    FIRST_STEP = 1
    STEP = 2
    CHECKPOINT = 3
    SAMPLE = 4
    END = 5

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class HeartbeatState:
    """The content of a heartbeat. `progress` counts progress of the loop; `alive` increases while any Python runs."""

    phase: Phase
    step: int
    progress: int
    alive: int


@dataclass(frozen=True)
class Failure:
    """The error that ended a rank. `secondary` is True if the rank only lost the other ranks."""

    text: str
    secondary: bool


class Heartbeat:
    """The shared memory. Without a descriptor it is private memory, for a rank without a supervisor."""

    def __init__(self, descriptor: int = -1) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, MEMORY_BYTES)
        self._phase, self._step, self._progress_count = Phase.START, 0, 0

    @classmethod
    def create(cls) -> Heartbeat:
        """Create shared memory whose descriptor a worker inherits."""
        descriptor = memory_file("sdit-heartbeat")
        os.truncate(descriptor, MEMORY_BYTES)
        return cls(descriptor)

    def close(self) -> None:
        self._memory.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def enter(self, phase: Phase, step: int) -> None:
        """Enter a phase or a step, which is progress. Measured: 0.2 microseconds."""
        self._phase, self._step = phase, step
        self.progress()

    def progress(self) -> None:
        """Report progress within a step. If all ranks stall, the one with the least progress is the root cause."""
        self._progress_count += 1
        _PROGRESS.pack_into(self._memory, _PROGRESS_AT, self._phase, self._step, self._progress_count)

    def keep_alive(self) -> None:
        """Start a thread that counts while Python runs.

        It does not count if the process is stopped or C code holds the interpreter lock.
        """
        threading.Thread(target=self._count_alive, name="sdit-heartbeat", daemon=True).start()

    def _count_alive(self) -> None:
        pause, alive = threading.Event(), 0
        while not pause.wait(ALIVE_SECONDS):
            alive += 1
            _ALIVE.pack_into(self._memory, _ALIVE_AT, alive)

    def read(self) -> HeartbeatState:
        phase, step, progress = _PROGRESS.unpack_from(self._memory, _PROGRESS_AT)
        return HeartbeatState(Phase(phase), step, progress, *_ALIVE.unpack_from(self._memory, _ALIVE_AT))

    def request_stop(self, reason: int = signal.SIGTERM) -> None:
        """Ask the rank to save and stop after the current step. `reason` is a signal's number or one of `REASONS`."""
        _STOP.pack_into(self._memory, _STOP_AT, reason)

    @property
    def stop_requested(self) -> bool:
        return bool(_STOP.unpack_from(self._memory, _STOP_AT)[0])

    @property
    def stop_reason(self) -> str:
        """The reason of a stop request, such as `SIGTERM`, or an empty string."""
        reason = _STOP.unpack_from(self._memory, _STOP_AT)[0]
        return (REASONS.get(reason) or signal.Signals(reason).name) if reason else ""

    def fail(self, text: str, secondary: bool) -> None:
        """Report the error that ends the rank to the supervisor."""
        data = " ".join(text.split()).encode()[: MEMORY_BYTES - _TEXT_AT]
        self._memory[_TEXT_AT : _TEXT_AT + len(data)] = data
        _ERROR.pack_into(self._memory, _ERROR_AT, 2 if secondary else 1, len(data))

    def failure(self) -> Failure | None:
        kind, length = _ERROR.unpack_from(self._memory, _ERROR_AT)
        if not kind:
            return None
        return Failure(self._memory[_TEXT_AT : _TEXT_AT + length].decode(errors="replace"), kind == 2)


def memory_file(name: str) -> int:
    """Return the descriptor of a new file in memory. The kernel frees it when the last process closes it.

    Some builds of Python for old systems have no memfd_create. They take a file without a name.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
