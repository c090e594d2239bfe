"""One rank's supervisor: starts the rank, watches its pulse, ends it when told to, and says how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from sdit.config import ObserveConfig, SuperviseConfig
from sdit.errors import ConfigError, ExitCode
from sdit.launch_environment import LAUNCHER_VARIABLE, RankInfo
from sdit.supervise.admission import refuse_own
from sdit.supervise.board import Board, Note, Plan, Waiting
from sdit.supervise.child import HANGUP, Charge, Child, stop_signals
from sdit.supervise.launch import LaunchMark, processes_to_watch
from sdit.supervise.leader import LOST_SECONDS, Leader, Meeting
from sdit.supervise.lock import RunLock, unwritable
from sdit.supervise.membership import Membership
from sdit.supervise.metrics_publisher import MetricsPublisher
from sdit.supervise.process import command_of, machine, start_ticks
from sdit.supervise.pulse import FOLDER_MOVED, LAUNCHER_GONE, TICK_SECONDS, Phase, Pulse
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.unfinished import Unfinished
from sdit.supervise.verdict import End

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.1
BOARD_SECONDS = 0.5
SAME_SIGNAL_SECONDS = 0.2  # launchers signal a process group and its processes: that is one signal
FROZEN_SECONDS = 5.0  # ten ticks
FOREIGN = ("TORCHELASTIC_",)  # with these, torch would look for torchrun's store instead of rank 0's


@dataclass(frozen=True)
class Job:
    """What to supervise: `command` is the rank's, `digest` stands for its config, `largest_world` see `Leader`.

    `observe` says where the node's metrics are served; None: nowhere. `steps` is the length of the run, if it is known.
    """

    command: Sequence[str]
    run_dir: Path
    digest: str
    largest_world: Callable[[int], int]
    observe: ObserveConfig | None = None
    steps: int | None = None


def supervise(job: Job, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str]) -> int:
    """Run one rank to the end of the run; return the exit code, which is the same on all ranks of the launch.

    Rank 0 takes the run's lock before it touches anything that another launch may use.

    Raises: ConfigError when another process uses the run directory, or it cannot be written.
    """
    folder = RunFolder.create(job.run_dir)
    run_dir = folder.anchor
    waiting = Waiting(run_dir)
    note = Note(
        info.rank, uuid.uuid4().hex, socket.gethostname(), os.getpid(), job.digest, start_ticks(os.getpid()), machine(),
        LaunchMark.of_this_process(environment),
    )  # fmt: skip
    if info.rank != 0:
        try:
            waiting.open()
            waiting.post(note)
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        try:
            return Supervisor(
                job, folder, config, info, environment, note, Membership(run_dir, job.run_dir, note, waiting)
            ).run()
        finally:
            waiting.withdraw(note)
    try:
        lock = RunLock(job.run_dir, launch=asdict(note.launch))
    except ConfigError:
        if info.world > 1:
            refuse_own(waiting, note, info.world, job.run_dir, ExitCode.CONFIG)
        raise
    lock.follow(run_dir)
    with lock:
        board = Board(run_dir, lock.token)
        try:
            folder.make("logs")
            board.open()
            waiting.wipe()
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        leader = Leader(
            board, waiting, note, config, run_dir, info.world,
            Meeting.from_environment(environment, info.local_world == info.world), job.largest_world,
            Unfinished(run_dir, lock.token, job.steps),
        )  # fmt: skip
        member = Membership(run_dir, job.run_dir, note, waiting, board)
        return Supervisor(job, folder, config, info, environment, note, member, lock, leader).run()


class Supervisor:
    """The loop of one rank's parent process. Rank 0's has the run's lock and leads the others."""

    def __init__(
        self, job: Job, folder: RunFolder, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str],
        note: Note, member: Membership, lock: RunLock | None = None, leader: Leader | None = None,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._job, self._config, self._info, self._environment = job, config, info, environment
        self._note, self._member, self._lock, self._leader = note, member, lock, leader
        self._publisher = MetricsPublisher(job.observe, job.run_dir, self._note)
        self._child: Child | None = None
        self._end: End | None = None  # of this attempt; posted again at each look if its file is missing
        self._attempt = 0
        self._above = [(each, " ".join(command_of(each.pid))[:80]) for each in processes_to_watch(info.world)]
        self._launcher_gone = ""
        self._stop_reason = 0  # the first signal, or LAUNCHER_GONE; 0: nobody asked for a stop
        self._signals: list[float] = []  # when; without SIGHUP, which never asks for a quick stop
        self._stop_seconds = 0.0
        self._plan: Plan | None = None
        self._plan_idle_seconds = 0.0
        self._unwritten_since: float | None = None  # since when something cannot be posted

    def run(self) -> int:
        """Follow the plan until it gives an exit code."""
        previous = {number: signal.signal(number, self._note_signal) for number in stop_signals()}
        before, board_due = time.monotonic(), 0.0
        try:
            while True:
                now = time.monotonic()
                seconds, before = min(now - before, 1.0), now
                if self._child is not None:
                    self._watch(self._child, seconds)
                self._obey_signals(seconds)
                if self._lock is not None and not self._lock.beat():
                    return self._leave("another process has taken the lock of the run directory")
                self._plan_idle_seconds += seconds
                if now >= board_due or self._child is None:
                    board_due = now + BOARD_SECONDS
                    code = self._consult()
                    if code is not None:
                        return code
                    self._publisher.publish(
                        self._plan, self._attempt, self._child, self._deadline_seconds(), int(self._is_stopping)
                    )
                time.sleep(POLL_SECONDS)
        finally:
            if self._child is not None:
                self._child.kill()
            self._publisher.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _consult(self) -> int | None:
        """Say what is to be said, read the plan and do as it says; the exit code when the run is over."""
        now = self._folder.now
        if now is None:
            return self._leave_lost_folder()
        if now != self._folder.path:
            self._stop_reason = self._stop_reason or FOLDER_MOVED
        try:
            if self._end is not None:
                self._member.post_end(self._attempt, self._end)
            self._unwritten_since = None
        except OSError as error:  # a full disk: the next look tries again
            if self._unwritten_since is None:
                self._unwritten_since = time.monotonic()
                _log.warning("rank %d: the supervisors' folder cannot be written (%s)", self._info.rank, error.strerror)
            elif time.monotonic() - self._unwritten_since > LOST_SECONDS:
                return self._leave(f"run_dir: {self._folder}: cannot be written ({error.strerror})", ExitCode.IO)
        if self._leader is not None:
            self._leader.stopping, self._leader.problem = self._is_stopping, self._folder.problem
            self._leader.poll()
        plan = self._find_plan()
        if plan is None and self._plan is None:
            code = self._turned_away()
            if code is not None:
                return code
        if plan is not None:
            if self._plan is not None and plan.members["0"] != self._plan.members["0"]:
                self._follow_new_leader()
            if plan != self._plan:
                self._plan, self._plan_idle_seconds = plan, 0.0
            if plan.code is not None:
                return plan.code
            if plan.ending and plan.attempt == self._attempt and self._child is not None:
                self._end_child(self._child, "peer", dump=True)
            elif plan.attempt > self._attempt and not plan.ending:
                self._attempt, self._end = plan.attempt, None
                if self._info.rank in plan.order:
                    self._start(plan)
        has_begun = self._plan is not None and self._plan.attempt > 0
        patience = LOST_SECONDS if has_begun else self._config.start_seconds + LOST_SECONDS
        if self._plan_idle_seconds > patience:
            problem = self._member.problem()
            if problem:
                return self._leave(f"run_dir: {self._folder}: cannot be written ({problem})", ExitCode.IO)
            return self._leave("rank 0's supervisor does not answer")
        return None

    def _find_plan(self) -> Plan | None:
        try:
            return self._member.plan()
        except OSError as error:  # a full disk: announced again at the next look
            _log.warning("rank %d: %s", self._info.rank, error)
            return None

    def _turned_away(self) -> int | None:
        """Return the exit code if no plan will ever name this rank; None while one may."""
        refusal = self._member.refusal()
        if refusal is None:
            return ExitCode.CRASH if self._is_stopping and self._leader is None else None
        code, text = refusal
        if text:
            print(f"error: rank {self._info.rank}: {text}", file=sys.stderr, flush=True)
        return code

    def _follow_new_leader(self) -> None:
        """Rank 0's supervisor was replaced: its attempts count from 1 again, and ours is none of them."""
        if self._child is not None:
            self._end_child(self._child, "peer", dump=False)
        self._attempt, self._end = 0, None

    def _start(self, plan: Plan) -> None:
        rank, world = plan.order.index(self._info.rank), len(plan.order)
        local_world = plan.hosts.count(self._note.host) if world < self._info.world else self._info.local_world
        kept = {name: value for name, value in self._environment.items() if not name.startswith(FOREIGN)}
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": self._info.local_rank}
        meeting = {"MASTER_ADDR": plan.address, "MASTER_PORT": plan.port}
        node = {"LOCAL_WORLD_SIZE": local_world, "LOCAL_SIZE": local_world, LAUNCHER_VARIABLE: self._info.source}
        with contextlib.suppress(OSError):
            self._folder.make("logs")  # somebody may have removed it under a running launch
        stacks = (self._folder / "logs").absolute() / f"rank-{self._info.rank:03d}.stacks"
        pulse = Pulse.create()
        charge = Charge(pulse.descriptor, plan.attempt, os.getpid(), str(stacks), plan.resume, self._publisher.path)
        environment = {**kept, **{name: str(value) for name, value in {**place, **meeting, **node}.items()}}
        self._child = Child(self._job.command, environment, charge, pulse)
        if self._is_stopping:
            pulse.request_stop(self._stop_reason)

    def _watch(self, child: Child, seconds: float) -> None:
        """Report a child that has ended by itself; end one that is past its deadline."""
        code = child.look(seconds)
        if code is not None:
            self._report(child, "exit", code)
        elif child.idle_seconds > deadline_seconds(self._config, child.beat.phase):
            self._end_child(child, "stall", dump=True)

    def _end_child(self, child: Child, cause: str, dump: bool) -> None:
        patience = min(FROZEN_SECONDS, deadline_seconds(self._config, child.beat.phase) / 2)
        frozen = child.tickless_seconds > max(patience, 3 * TICK_SECONDS)
        if dump:
            beat = child.beat
            child.dump_stacks(f"attempt {self._attempt}, step {beat.step}, phase {beat.phase.label} ({cause})")
        self._report(child, cause, child.kill(), frozen)

    def _report(self, child: Child, cause: str, code: int, frozen: bool = False) -> None:
        beat, failure = child.pulse.beat(), child.pulse.failure()
        self._end = End(
            self._info.rank, self._note.host, cause, code, int(beat.phase), beat.step, beat.marks, frozen,
            failure is not None and failure.secondary, failure.text if failure is not None else self._launcher_gone,
            self._is_stopping,
        )  # fmt: skip
        self._publisher.count_end(self._end)
        self._child = None
        child.pulse.close()

    def _deadline_seconds(self) -> float:
        return deadline_seconds(self._config, self._child.beat.phase) if self._child is not None else 0.0

    @property
    def _is_stopping(self) -> bool:
        return self._stop_reason != 0

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stop_reason = self._stop_reason or number
        if number == HANGUP:  # the kernel, the shell and the launcher may each send one
            return
        now = time.monotonic()
        if not self._signals or now - self._signals[-1] > SAME_SIGNAL_SECONDS:
            self._signals.append(now)

    def _obey_signals(self, seconds: float) -> None:
        """The first signal asks the rank to save and stop; the second, or the end of the grace, ends it at once."""
        self._look_for_launcher()
        if not self._is_stopping or self._child is None:
            return
        self._stop_seconds += seconds
        self._child.pulse.request_stop(self._stop_reason)
        if len(self._signals) > 1:
            self._end_child(self._child, "exit", dump=False)
        elif self._stop_seconds > self._config.grace_seconds:
            self._end_child(self._child, "stall", dump=True)

    def _leave_lost_folder(self) -> int:
        """The run cannot be saved anywhere. The supervisors cannot agree either: each sees it, one of each host reports it."""
        if self._info.local_rank == 0:
            print(f"error: {self._folder.problem}", file=sys.stderr, flush=True)
        return ExitCode.CONFIG

    def _look_for_launcher(self) -> None:
        """If a process of the launcher is gone, the rank saves and stops. That is no signal: one that follows is the first."""
        if self._launcher_gone:
            return
        for process, command in self._above:
            if not process.is_running:
                self._launcher_gone = f"the launcher's process {process.pid} ({command}) is gone"
                self._stop_reason = self._stop_reason or LAUNCHER_GONE
                print(f"rank {self._info.rank}: {self._launcher_gone}; saving and leaving", file=sys.stderr, flush=True)
                return

    def _leave(self, why: str, code: ExitCode = ExitCode.CRASH) -> int:
        where = f"rank {self._info.rank}, host {self._note.host}"
        if self._child is not None:
            where += f", step {self._child.beat.step}, phase {self._child.beat.phase.label}"
        print(f"FATAL {where}: {why}; next: none", file=sys.stderr, flush=True)
        return code


def deadline_seconds(config: SuperviseConfig, phase: Phase) -> float:
    """How long a rank may go without progress in a phase."""
    return {
        Phase.START: config.start_seconds,
        Phase.FIRST_STEP: config.first_step_seconds,
        Phase.STEP: config.step_seconds,
        Phase.CHECKPOINT: config.checkpoint_seconds,
        Phase.SAMPLE: config.sample_seconds,
        Phase.END: config.grace_seconds,
    }[phase]
