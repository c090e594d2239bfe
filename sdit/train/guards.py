"""What keeps a run from going bad quietly: non-finite steps, loss spikes, stop signals."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType

from sdit.supervise.child import HANGUP, stop_signals
from sdit.supervise.pulse import Pulse

SPIKE_MEMORY_STEPS = 100  # loss statistics forget with this time constant


class RollBack(Exception):
    """The step cannot stand: go back to a checkpoint and leave its samples out. Caught by the trainer."""


class StopAgreed(Exception):
    """All ranks know that one of them was asked to stop: save and leave. Caught by the trainer."""


class BadStepGuard:
    """Counts non-finite steps in a row and ends the run when there are too many."""

    def __init__(self, max_bad_steps: int) -> None:
        self._max = max_bad_steps
        self.in_a_row = 0

    def accept(self, *values: float) -> bool:
        """Whether the step may be taken: every value is finite."""
        if all(math.isfinite(value) for value in values):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        return False

    @property
    def problem(self) -> str:
        """What to say when `max_bad_steps` steps in a row were non-finite; empty before that."""
        if self.in_a_row < self._max:
            return ""
        return f"train.max_bad_steps: {self.in_a_row} steps in a row had a non-finite loss or gradient"


class SpikeDetector:
    """Exponentially weighted mean and variance of the loss; says when a value lies far above."""

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._mean = self._variance = 0.0
        self._count = 0

    def observe(self, loss: float) -> bool:
        """Take in a loss; True when it lies `deviations` standard deviations above the mean so far."""
        self._count += 1
        far = self._count > SPIKE_MEMORY_STEPS and loss > self._mean + self._deviations * math.sqrt(self._variance)
        rate = max(1.0 / self._count, 1.0 / SPIKE_MEMORY_STEPS)
        delta = loss - self._mean
        self._mean += rate * delta
        self._variance = (1 - rate) * (self._variance + rate * delta * delta)
        return far


class StopSignals:
    """SIGTERM, SIGUSR1, SIGINT and SIGHUP ask for a stop after the present step. The second one is obeyed at once.

    A SIGHUP is never the second one, because a lost terminal sends several. A supervisor asks through the pulse:
    launchers that signal whole process trees would be heard twice.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == HANGUP:
            self.received = self.received or HANGUP
            return
        if self.received not in (None, HANGUP):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether somebody wants the run to stop."""
        return self.received is not None or self._pulse.stop_requested

    @property
    def reason(self) -> str:
        """Why somebody wants the run to stop, such as `SIGTERM`; empty: nobody does."""
        return self.received.name if self.received is not None else self._pulse.stop_reason

    def close(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
