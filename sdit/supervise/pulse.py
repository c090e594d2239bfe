"""A rank's pulse: a page of memory that it shares with its supervisor, which reads it whatever the rank is doing."""

from __future__ import annotations

import enum
import mmap
import os
import signal
import struct
import tempfile
import threading
from dataclasses import dataclass

PAGE_BYTES = 8192
TICK_SECONDS = 0.5
LAUNCHER_GONE, FOLDER_MOVED = 254, 255  # no signals have these numbers
REASONS = {LAUNCHER_GONE: "its launcher is gone", FOLDER_MOVED: "the run folder is no longer at its path"}
_STOP = struct.Struct("<B")  # each writer has its own place: nobody overwrites what another one writes
_MARK = struct.Struct("<BQQ")
_TICK = struct.Struct("<Q")
_ERROR = struct.Struct("<BH")
_STOP_AT, _MARK_AT, _TICK_AT, _ERROR_AT = 0, 64, 128, 192
_TEXT_AT = 256


class Phase(enum.IntEnum):
    """What a rank is doing; each has its own deadline."""

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
class Beat:
    """One look at a pulse: `marks` counts progress of the loop, `ticks` grows while Python can run at all."""

    phase: Phase
    step: int
    marks: int
    ticks: int


@dataclass(frozen=True)
class Failure:
    """Why a rank says that it ended; `secondary` when it merely lost the other ranks."""

    text: str
    secondary: bool


class Pulse:
    """The shared page. Without a descriptor it is private memory: a rank that nobody supervises marks it, too."""

    def __init__(self, descriptor: int = -1) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, PAGE_BYTES)
        self._phase, self._step, self._marks = Phase.START, 0, 0

    @classmethod
    def create(cls) -> Pulse:
        """A new page for a child to inherit by its descriptor; it goes with the last process that holds it."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("sdit-pulse")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.truncate(descriptor, PAGE_BYTES)
        return cls(descriptor)

    def close(self) -> None:
        self._page.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def mark(self, phase: Phase, step: int) -> None:
        """Progress was made. Measured: 0.2 microseconds."""
        self._phase, self._step = phase, step
        self.tap()

    def tap(self) -> None:
        """Progress was made within the step: of ranks that all stand still, the one with the fewest is at fault."""
        self._marks += 1
        _MARK.pack_into(self._page, _MARK_AT, self._phase, self._step, self._marks)

    def keep_ticking(self) -> None:
        """Tick from a thread; no ticks mean that the process is stopped, or that something holds Python's lock."""
        threading.Thread(target=self._tick, name="sdit-pulse", daemon=True).start()

    def _tick(self) -> None:
        pause, ticks = threading.Event(), 0
        while not pause.wait(TICK_SECONDS):
            ticks += 1
            _TICK.pack_into(self._page, _TICK_AT, ticks)

    def beat(self) -> Beat:
        phase, step, marks = _MARK.unpack_from(self._page, _MARK_AT)
        return Beat(Phase(phase), step, marks, *_TICK.unpack_from(self._page, _TICK_AT))

    def request_stop(self, reason: int = signal.SIGTERM) -> None:
        """Ask the rank to save and end after its present step. `reason`: a signal's number, or one of `REASONS`."""
        _STOP.pack_into(self._page, _STOP_AT, reason)

    @property
    def stop_requested(self) -> bool:
        return bool(_STOP.unpack_from(self._page, _STOP_AT)[0])

    @property
    def stop_reason(self) -> str:
        """Why a stop was asked for, such as `SIGTERM`; empty: nobody asked."""
        reason = _STOP.unpack_from(self._page, _STOP_AT)[0]
        return (REASONS.get(reason) or signal.Signals(reason).name) if reason else ""

    def fail(self, text: str, secondary: bool) -> None:
        """Leave a last word for the supervisor."""
        data = " ".join(text.split()).encode()[: PAGE_BYTES - _TEXT_AT]
        self._page[_TEXT_AT : _TEXT_AT + len(data)] = data
        _ERROR.pack_into(self._page, _ERROR_AT, 2 if secondary else 1, len(data))

    def failure(self) -> Failure | None:
        kind, length = _ERROR.unpack_from(self._page, _ERROR_AT)
        if not kind:
            return None
        return Failure(self._page[_TEXT_AT : _TEXT_AT + length].decode(errors="replace"), kind == 2)
