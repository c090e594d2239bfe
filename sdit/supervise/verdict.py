"""How a rank ended, whose fault it was, and what happens next: pure functions of what the ranks reported."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdit.errors import ExitCode, one_line
from sdit.supervise.pulse import Phase

REFUSED = {ExitCode.USAGE, ExitCode.CONFIG}  # the user's to mend: an error, not a fault of the run
TEXT_CHARACTERS = 600
REFUSED_CHARACTERS = 2000  # a refusal lists what is legal
FINAL = {ExitCode.DATA, ExitCode.IO}  # another attempt would end alike


@dataclass(frozen=True)
class End:
    """How one rank's attempt ended; `cause`: exit, stall (a deadline), peer (another rank ended) or lost."""

    rank: int
    host: str
    cause: str
    code: int
    phase: int = 0
    step: int = 0
    marks: int = 0
    frozen: bool = False
    secondary: bool = False
    text: str = ""
    stopping: bool = False

    @property
    def is_clean(self) -> bool:
        return self.cause == "exit" and self.code in (ExitCode.DONE, ExitCode.REQUEUE)

    def describe(self) -> str:
        """`rank 1, host n7, step 12, phase step: killed by SIGKILL`."""
        where = f"rank {self.rank}, host {self.host}, step {self.step}, phase {Phase(self.phase).label}"
        # A stalled rank that wakes up while it is ended finds the others gone: that is no reason.
        text = "" if self.cause == "stall" and self.secondary else one_line(self.text, TEXT_CHARACTERS)
        return f"{where}: {self._what()}" + (f" ({text})" if text else "")

    def _what(self) -> str:
        if self.cause == "stall":
            return "frozen: not even Python runs in it" if self.frozen else "no progress before its deadline"
        if self.cause == "lost":
            return "its supervisor does not answer"
        return f"killed by {_signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"


def _signal_name(number: int) -> str:
    """`SIGKILL`; real-time signals have no names."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


@dataclass(frozen=True)
class Verdict:
    """What comes after an attempt: another one, or the end of the run with `code`."""

    restart: bool
    code: int
    text: str


def culprit(ends: Sequence[End]) -> End:
    """The rank that an attempt's end is put down to: the others fail, or wait for ever, because of it.

    First one that ended by itself, then one that is frozen, then among the stalled, and at last among those that merely
    lost the others, the one that is furthest behind.
    """

    def order(end: End) -> tuple[int, int, int]:
        if end.is_clean:
            return (4, 0, end.rank)
        if end.frozen:
            return (1, 0, end.rank)
        if end.secondary or end.cause == "peer":
            return (3, end.marks, end.rank)
        return (2, end.marks, end.rank) if end.cause == "stall" else (0, 0, end.rank)

    return min(ends, key=order)


class Judge:
    """Counts restarts that brought no newer checkpoint."""

    def __init__(self, restarts: int, stop_code: int) -> None:
        self._allowed, self._stop_code = restarts, stop_code
        self._newest = ""
        self._faults: list[tuple[object, ...]] = []

    def begin(self, newest_checkpoint: str) -> None:
        """The run's first attempt starts from this checkpoint (empty: none)."""
        self._newest = newest_checkpoint

    def decide(self, ends: Mapping[int, End], newest_checkpoint: str, stopping: bool) -> Verdict:
        """Every rank's attempt is over: what now?"""
        if all(end.is_clean for end in ends.values()):
            stopped = any(end.code == ExitCode.REQUEUE for end in ends.values())
            return Verdict(False, self._stop_code if stopped else ExitCode.DONE, "")
        fault = culprit(list(ends.values()))
        if fault.cause == "exit" and fault.code in REFUSED:
            return Verdict(False, fault.code, one_line(fault.text, REFUSED_CHARACTERS) or fault.describe())
        if fault.cause == "exit" and fault.code in FINAL:
            return Verdict(False, fault.code, f"{fault.describe()}; next: none, a retry would end alike")
        if stopping or any(end.stopping for end in ends.values()):
            return Verdict(False, ExitCode.CRASH, f"{fault.describe()}; next: none, a stop was asked for")
        if newest_checkpoint != self._newest:
            self._newest, self._faults = newest_checkpoint, []
        self._faults.append((fault.rank, fault.step, fault.cause, fault.code, fault.text))
        made = len(self._faults) - 1
        if made >= self._allowed:
            same = self._allowed > 0 and len(set(self._faults)) == 1 and fault.cause == "exit" and fault.code > 0
            code = ExitCode.DATA if same else ExitCode.CRASH
            why = "the same error every time" if same else "no newer checkpoint since"
            next_step = f"next: none, {made} restarts made, {why} (exit {int(code)})"
            return Verdict(False, code, f"{fault.describe()}; {next_step}")
        start = f"from {self._newest}" if self._newest else "from the start"
        return Verdict(True, ExitCode.CRASH, f"{fault.describe()}; next: restart {made + 1} of {self._allowed} {start}")
