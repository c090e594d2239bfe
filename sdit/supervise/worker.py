"""The worker process: the training rank in a separate session. It cannot outlive its supervisor."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol, TextIO

from sdit.supervise.heartbeat import Heartbeat, HeartbeatState

VARIABLE = "SDIT_SUPERVISED"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HANGUP = signal.SIGHUP
STACK_SIGNAL = signal.SIGQUIT  # NCCL and schedulers use USR1 and USR2
DUMP_SECONDS = 3.0
DUMP_QUIET_POLLS = 4  # 0.2 s: a busy machine may pause a process during its dump
KILL_SECONDS = 10.0  # a killed process ends within this time unless the kernel cannot end it
PR_SET_PDEATHSIG = 1
_log = logging.getLogger(__name__)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to save and stop.

    SIGHUP is one of them unless it is ignored, as under `nohup`.
    """
    return STOP_SIGNALS if signal.getsignal(HANGUP) == signal.SIG_IGN else (*STOP_SIGNALS, HANGUP)


@dataclass(frozen=True)
class WorkerSpec:
    """The data that a supervisor passes to its worker.

    `heartbeat` and `stacks` are file descriptors of memory, `parent` is the supervisor's process id.
    `metrics_path` is the shared metrics file, or empty if metrics are off.
    """

    heartbeat: int
    attempt: int
    parent: int
    stacks: int
    resume: str | None = None
    metrics_path: str = ""


@dataclass
class WorkerContext:
    """The supervision state of a worker. A process without a supervisor also has one, with a private heartbeat."""

    heartbeat: Heartbeat
    attempt: int = 1
    resume: str | None = None
    is_supervised: bool = False
    metrics_path: Path | None = None  # None if metrics are off
    _stacks: TextIO | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> WorkerContext:
        """Connect to the supervisor, if there is one. A rank calls it first.

        After this the process ends with its supervisor, dumps its stacks on request, and updates its heartbeat.
        """
        if VARIABLE not in environment:
            return cls(Heartbeat())
        worker_spec = WorkerSpec(**json.loads(environment[VARIABLE]))
        _die_with(worker_spec.parent)
        # A launcher may signal the whole process tree while this rank starts. The supervisor also gets the signal.
        for number in stop_signals():
            signal.signal(number, _ignore_signal)
        stacks = os.fdopen(worker_spec.stacks, "a", encoding="utf-8")  # faulthandler keeps its descriptor open
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        heartbeat = Heartbeat(worker_spec.heartbeat)
        heartbeat.keep_alive()
        metrics_path = Path(worker_spec.metrics_path) if worker_spec.metrics_path else None
        return cls(heartbeat, worker_spec.attempt, worker_spec.resume, True, metrics_path, stacks)

    def append_stacks(self, text: str) -> None:
        """Append text, such as a traceback, to the stack dumps. The supervisor writes them to the file of the node."""
        if self._stacks is not None:
            with contextlib.suppress(OSError):  # no memory: no traceback
                self._stacks.write(f"\nattempt {self.attempt}\n{text}")
                self._stacks.flush()


def _ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Programs that this rank starts would inherit SIG_IGN, but not a handler."""


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its supervisor ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


class ChildProcess(Protocol):
    """The methods of `subprocess.Popen` that are used here."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class WorkerProcess:
    """A worker process, the newest state of its heartbeat, and why it was killed, if it was.

    `end_cause` is the `cause` of its exit report. `was_frozen` is True if no Python ran in it when it was killed.
    """

    def __init__(self, process: ChildProcess, worker_spec: WorkerSpec, heartbeat: Heartbeat) -> None:
        """Take ownership of the descriptors of the heartbeat and of the stack dumps."""
        self.heartbeat, self._process = heartbeat, process
        self._stacks, self._stacks_taken = worker_spec.stacks, 0
        self.state: HeartbeatState = heartbeat.read()
        self.idle_seconds = self.unresponsive_seconds = self.killed_seconds = 0.0
        self.end_cause, self.was_frozen, self.is_killed = "exit", False, False

    def poll(self, seconds: float) -> int | None:
        """Read the heartbeat, `seconds` after the last read. Return the exit code of a worker that has ended, else None.

        Idle time is the sum of `seconds`, so a suspended machine or a clock change causes no timeout.
        """
        state = self.heartbeat.read()
        self.idle_seconds = 0.0 if state.progress != self.state.progress else self.idle_seconds + seconds
        self.unresponsive_seconds = 0.0 if state.alive != self.state.alive else self.unresponsive_seconds + seconds
        self.state, code = state, self._process.poll()
        if code is None and self.is_killed:
            self._count_killed(seconds)
        return code

    def _count_killed(self, seconds: float) -> None:
        """Log once that the worker still exists `KILL_SECONDS` after it was killed."""
        before, self.killed_seconds = self.killed_seconds, self.killed_seconds + seconds
        if before <= KILL_SECONDS < self.killed_seconds:
            text = "process %d was killed %g s ago and still exists: a driver or a file system holds it"
            _log.warning(text, self.pid, KILL_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    def dump_stacks(self, title: str) -> str:
        """Return `title` and the stacks of the worker's Python threads. This does not need the interpreter lock."""
        before = self.take_stacks()
        self._signal(STACK_SIGNAL)
        self._signal(signal.SIGCONT)  # a stopped process handles signals when it continues
        self._await_stacks(self._stacks_taken)
        return f"{before}\n{title}\n{self.take_stacks()}"

    def take_stacks(self) -> str:
        """Return the dumps and tracebacks that the worker has written since the last call."""
        data = os.pread(self._stacks, max(0, self._stacks_bytes() - self._stacks_taken), self._stacks_taken)
        self._stacks_taken += len(data)
        return data.decode(errors="replace")

    def _stacks_bytes(self) -> int:
        return os.fstat(self._stacks).st_size

    def _await_stacks(self, size: int) -> None:
        """Wait until the dump that begins at byte `size` is complete. It then ends with a newline and stops growing."""
        deadline, seen, quiet = time.monotonic() + DUMP_SECONDS, size, 0
        while quiet < DUMP_QUIET_POLLS and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            self._signal(signal.SIGCONT)  # it may be stopped again during the dump
            now = self._stacks_bytes()
            whole = now > size and now == seen and os.pread(self._stacks, 1, now - 1) == b"\n"
            seen, quiet = now, quiet + 1 if whole else 0

    def close(self) -> None:
        """Free the memory that was shared with the worker."""
        self.heartbeat.close()
        os.close(self._stacks)

    def kill(self, cause: str = "exit", frozen: bool = False) -> None:
        """Kill the worker and its process group. `poll` returns its exit code when the kernel has ended it.

        This may never happen: the kernel cannot end a process that waits in a driver.
        """
        self.end_cause, self.was_frozen, self.is_killed = cause, frozen, True
        self._signal(signal.SIGKILL)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the worker has ended. Return whether it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_seconds)
        return self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, number)
            except (ProcessLookupError, PermissionError):  # its session does not exist yet
                self._process.send_signal(number)


StartWorker = Callable[[Sequence[str], Mapping[str, str], WorkerSpec, Heartbeat], WorkerProcess]


def start_worker_process(
    command: Sequence[str], environment: Mapping[str, str], worker_spec: WorkerSpec, heartbeat: Heartbeat
) -> WorkerProcess:
    """Start `command` as a worker process in a new session."""
    process = subprocess.Popen(
        command,
        env={**environment, VARIABLE: json.dumps(asdict(worker_spec))},
        pass_fds=(heartbeat.descriptor, worker_spec.stacks),
        start_new_session=True,
    )
    return WorkerProcess(process, worker_spec, heartbeat)
