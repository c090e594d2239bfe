"""Whether a supervisor was asked to stop: by a signal, because its launcher is gone, or because the run folder was moved."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

from sdit.launch_environment import RankInfo
from sdit.supervise.heartbeat import LAUNCHER_GONE
from sdit.supervise.launch import processes_to_watch
from sdit.supervise.process import command_of
from sdit.supervise.worker import HANGUP, stop_signals

SAME_SIGNAL_SECONDS = 0.2  # launchers signal a process group and its processes: this counts as one signal


class StopRequest:
    """Handles the stop signals inside a `with`. `launcher_gone` says which process of the launcher has ended."""

    def __init__(self, info: RankInfo) -> None:
        self.reason = 0  # the first signal, LAUNCHER_GONE or FOLDER_MOVED; 0: no stop was requested
        self.launcher_gone = ""
        self._rank = info.rank
        self._above = [(each, " ".join(command_of(each.pid))[:80]) for each in processes_to_watch(info.world)]
        self._signals: list[float] = []  # when; without SIGHUP, which never asks for a quick stop

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_set(self) -> bool:
        """Return whether a stop was requested."""
        return self.reason != 0

    @property
    def is_urgent(self) -> bool:
        """Return whether a second signal asked to stop at once."""
        return len(self._signals) > 1

    def request(self, reason: int) -> None:
        """Request a stop, unless one was requested already."""
        self.reason = self.reason or reason

    def check_launcher(self) -> None:
        """Request a stop if a process of the launcher is gone. This does not count as a signal."""
        if self.launcher_gone:
            return
        for process, command in self._above:
            if not process.is_running:
                self.launcher_gone = f"the launcher's process {process.pid} ({command}) is gone"
                self.request(LAUNCHER_GONE)
                print(f"rank {self._rank}: {self.launcher_gone}; saving and leaving", file=sys.stderr, flush=True)
                return

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.request(number)
        if number == HANGUP:  # the kernel, the shell and the launcher may each send one
            return
        now = time.monotonic()
        if not self._signals or now - self._signals[-1] > SAME_SIGNAL_SECONDS:
            self._signals.append(now)
