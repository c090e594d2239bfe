"""The restart policy: it finds the root cause in the exit reports of an attempt and decides the next action."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdit.errors import ExitCode, one_line
from sdit.supervise.heartbeat import Phase

REFUSED = {ExitCode.USAGE, ExitCode.CONFIG}  # the user must fix it
TEXT_CHARACTERS = 600
REFUSED_CHARACTERS = 2000  # a refusal lists the legal values
FINAL = {ExitCode.DATA, ExitCode.IO}  # another attempt would end in the same way


@dataclass(frozen=True)
class ExitReport:
    """The end of one rank's attempt. `cause`: exit, stall (a deadline), peer (another rank ended) or lost."""

    rank: int
    host: str
    cause: str
    code: int
    phase: int = 0
    step: int = 0
    progress: int = 0
    frozen: bool = False
    secondary: bool = False
    text: str = ""
    stopping: bool = False

    @property
    def is_clean(self) -> bool:
        return self.cause == "exit" and self.code in (ExitCode.DONE, ExitCode.REQUEUE)

    def describe(self) -> str:
        """Return `rank 1, host n7, step 12, phase step: killed by SIGKILL`."""
        where = f"rank {self.rank}, host {self.host}, step {self.step}, phase {Phase(self.phase).label}"
        # A stalled rank that continues while it is ended reports that it lost the others. That is not the cause.
        text = "" if self.cause == "stall" and self.secondary else one_line(self.text, TEXT_CHARACTERS)
        return f"{where}: {self._what()}" + (f" ({text})" if text else "")

    def _what(self) -> str:
        if self.cause == "stall":
            return "frozen: not even Python runs in it" if self.frozen else "no progress before its deadline"
        if self.cause == "lost":
            return "its supervisor does not answer"
        return f"killed by {_signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"


def _signal_name(number: int) -> str:
    """Return a name such as `SIGKILL`. Real-time signals have no names."""
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"


@dataclass(frozen=True)
class Decision:
    """The action after an attempt: a restart, or the end of the run with `code`."""

    restart: bool
    code: int
    text: str


def root_cause(exit_reports: Sequence[ExitReport]) -> ExitReport:
    """Return the exit report of the rank that made the attempt fail. The other ranks failed or waited because of it.

    The order is: a rank that ended by itself, a frozen rank, the stalled rank with the least progress, and last the rank with
    the least progress among those that only lost the others.
    """

    def order_key(report: ExitReport) -> tuple[int, int, int]:
        if report.is_clean:
            return (4, 0, report.rank)
        if report.frozen:
            return (1, 0, report.rank)
        if report.secondary or report.cause == "peer":
            return (3, report.progress, report.rank)
        return (2, report.progress, report.rank) if report.cause == "stall" else (0, 0, report.rank)

    return min(exit_reports, key=order_key)


class RestartPolicy:
    """Limits the restarts without a newer checkpoint."""

    def __init__(self, restarts: int, stop_code: int) -> None:
        self._allowed, self._stop_code = restarts, stop_code
        self._newest = ""
        self._faults: list[tuple[object, ...]] = []

    def begin(self, newest_checkpoint: str) -> None:
        """Set the checkpoint that the first attempt starts from (empty: none)."""
        self._newest = newest_checkpoint

    def decide(self, exit_reports: Mapping[int, ExitReport], newest_checkpoint: str, stopping: bool) -> Decision:
        """Return the decision after an attempt that has ended on all ranks."""
        if all(report.is_clean for report in exit_reports.values()):
            stopped = any(report.code == ExitCode.REQUEUE for report in exit_reports.values())
            return Decision(False, self._stop_code if stopped else ExitCode.DONE, "")
        fault = root_cause(list(exit_reports.values()))
        if fault.cause == "exit" and fault.code in REFUSED:
            return Decision(False, fault.code, one_line(fault.text, REFUSED_CHARACTERS) or fault.describe())
        if fault.cause == "exit" and fault.code in FINAL:
            return Decision(False, fault.code, f"{fault.describe()}; next: none, a retry would fail in the same way")
        if stopping or any(report.stopping for report in exit_reports.values()):
            return Decision(False, ExitCode.CRASH, f"{fault.describe()}; next: none, a stop was requested")
        if newest_checkpoint != self._newest:
            self._newest, self._faults = newest_checkpoint, []
        self._faults.append((fault.rank, fault.step, fault.cause, fault.code, fault.text))
        made = len(self._faults) - 1
        if made >= self._allowed:
            same = self._allowed > 0 and len(set(self._faults)) == 1 and fault.cause == "exit" and fault.code > 0
            code = ExitCode.DATA if same else ExitCode.CRASH
            why = "the same error each time" if same else "no newer checkpoint since then"
            next_step = f"next: none, {made} restarts made, {why} (exit {int(code)})"
            return Decision(False, code, f"{fault.describe()}; {next_step}")
        start = f"from {self._newest}" if self._newest else "from the start"
        next_step = f"next: restart {made + 1} of {self._allowed} {start}"
        return Decision(True, ExitCode.CRASH, f"{fault.describe()}; {next_step}")
