"""The real rank: a child process in a session of its own, that cannot outlive its supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from sdit.supervise.pulse import Beat, Pulse

VARIABLE = "SDIT_SUPERVISED"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HANGUP = signal.SIGHUP
STACK_SIGNAL = signal.SIGQUIT  # NCCL and schedulers use USR1 and USR2
DUMP_SECONDS = 3.0
DUMP_QUIET_POLLS = 4  # 0.2 s: a busy machine may halt a process in the middle of its dump
PR_SET_PDEATHSIG = 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and stop. SIGHUP is one of them unless it is ignored, as `nohup` has it."""
    return STOP_SIGNALS if signal.getsignal(HANGUP) == signal.SIG_IGN else (*STOP_SIGNALS, HANGUP)


@dataclass(frozen=True)
class Charge:
    """What a supervisor tells its child: the pulse to keep, the attempt it is part of, where stack dumps and metrics go."""

    pulse: int
    attempt: int
    parent: int
    stacks: str
    resume: str | None = None
    page: str = ""


@dataclass
class Supervised:
    """The child's side of supervision. Unsupervised processes have one as well; its pulse is then private."""

    pulse: Pulse
    attempt: int = 1
    resume: str | None = None
    is_supervised: bool = False
    page: Path | None = None  # of its metrics; None: nobody reads them
    _stacks: TextIO | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Supervised:
        """Called first thing in a rank: dies with its supervisor, answers to a request for its stacks, ticks."""
        if VARIABLE not in environment:
            return cls(Pulse())
        charge = Charge(**json.loads(environment[VARIABLE]))
        _die_with(charge.parent)
        # A launcher may signal the whole tree while this rank still starts. Its parent gets the signal as well.
        for number in stop_signals():
            signal.signal(number, _leave_it_to_the_parent)
        stacks = open(charge.stacks, "a", encoding="utf-8")  # noqa: SIM115 - faulthandler keeps its descriptor for good
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        pulse = Pulse(charge.pulse)
        pulse.keep_ticking()
        return cls(pulse, charge.attempt, charge.resume, True, Path(charge.page) if charge.page else None, stacks)


def _leave_it_to_the_parent(_number: int, _frame: FrameType | None) -> None:
    """A handler, not SIG_IGN: that one would be inherited by programs which this rank starts."""


def _die_with(parent: int) -> None:
    """Have the kernel (Linux) end this process when its supervisor dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


class Child:
    """A running rank, and what its pulse said when we last looked."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], charge: Charge, pulse: Pulse) -> None:
        self.pulse, self._stacks = pulse, Path(charge.stacks)
        self._process = subprocess.Popen(
            command,
            env={**environment, VARIABLE: json.dumps(asdict(charge))},
            pass_fds=(pulse.descriptor,),
            start_new_session=True,
        )
        self.beat: Beat = pulse.beat()
        self.idle_seconds = self.tickless_seconds = 0.0

    def look(self, seconds: float) -> int | None:
        """Take in the pulse, `seconds` after the last look; return the exit code of a child that has ended.

        Idle time is what this process itself saw go by, so a suspended machine or an unsteady clock accuses nobody.
        """
        beat = self.pulse.beat()
        self.idle_seconds = 0.0 if beat.marks != self.beat.marks else self.idle_seconds + seconds
        self.tickless_seconds = 0.0 if beat.ticks != self.beat.ticks else self.tickless_seconds + seconds
        self.beat = beat
        return self._process.poll()

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self, title: str) -> None:
        """Append the stacks of all of the child's Python threads to its file; the interpreter's lock is not needed."""
        with contextlib.suppress(OSError), self._stacks.open("a", encoding="utf-8") as file:  # a full disk: no dump
            file.write(f"\n{title}\n")
            file.flush()
            size = file.tell()
            self._signal(STACK_SIGNAL)
            self._signal(signal.SIGCONT)  # a stopped process handles signals when it goes on
            self._await_stacks(size)

    def _await_stacks(self, size: int) -> None:
        """Wait until the dump that begins at byte `size` is whole: it ends a line, and nothing follows for a while."""
        deadline, seen, quiet = time.monotonic() + DUMP_SECONDS, size, 0
        while quiet < DUMP_QUIET_POLLS and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            self._signal(signal.SIGCONT)  # whatever stopped it may do so again in the middle of its dump
            now = self._stacks.stat().st_size
            whole = now > size and now == seen and self._stacks.read_bytes().endswith(b"\n")
            seen, quiet = now, quiet + 1 if whole else 0

    def kill(self) -> int:
        """End the child and all that it started, at once; return its exit code."""
        self._signal(signal.SIGKILL)
        return self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):  # the instant before its session exists
                self._process.send_signal(number)
