"""The supervisor of one rank: starts the worker process, watches its heartbeat, ends it on request, reports how it ended."""

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
from sdit.supervise.coordinator import LOST_SECONDS, Coordinator, RendezvousEndpoint
from sdit.supervise.heartbeat import ALIVE_SECONDS, FOLDER_MOVED, LAUNCHER_GONE, Heartbeat, Phase
from sdit.supervise.launch import LaunchIdentity, processes_to_watch
from sdit.supervise.lock import RunLock, unwritable
from sdit.supervise.membership import Membership
from sdit.supervise.metrics_publisher import MetricsPublisher
from sdit.supervise.process import command_of, machine, start_ticks
from sdit.supervise.rendezvous import AttemptSpec, Member, MemberRegistry, RendezvousStore
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.unfinished import Unfinished
from sdit.supervise.worker import HANGUP, WorkerProcess, WorkerSpec, stop_signals

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.1
STORE_SECONDS = 0.5
SAME_SIGNAL_SECONDS = 0.2  # launchers signal a process group and its processes: this counts as one signal
FROZEN_SECONDS = 5.0  # ten alive
FOREIGN = ("TORCHELASTIC_",)  # with these, torch would look for torchrun's store instead of rank 0's


@dataclass(frozen=True)
class Job:
    """What to supervise: the worker's `command` and the `digest` of its config. `largest_world`: see `Coordinator`.

    `observe` says where metrics are served; None: nowhere. `steps` is the length of the run if it is known.
    """

    command: Sequence[str]
    run_dir: Path
    digest: str
    largest_world: Callable[[int], int]
    observe: ObserveConfig | None = None
    steps: int | None = None


def supervise(job: Job, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str]) -> int:
    """Supervise one rank to the end of the run. Return the exit code, which all ranks of the launch share.

    Rank 0 takes the run's lock before it touches anything that another launch may use.

    Raises: ConfigError when another process uses the run directory, or it cannot be written.
    """
    folder = RunFolder.create(job.run_dir)
    run_dir = folder.anchor
    registry = MemberRegistry(run_dir)
    member = Member(
        info.rank, uuid.uuid4().hex, socket.gethostname(), os.getpid(), job.digest, start_ticks(os.getpid()), machine(),
        LaunchIdentity.of_this_process(environment),
    )  # fmt: skip
    if info.rank != 0:
        try:
            registry.open()
            registry.post(member)
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        try:
            return Supervisor(
                job, folder, config, info, environment, member, Membership(run_dir, job.run_dir, member, registry)
            ).run()
        finally:
            registry.withdraw(member)
    try:
        lock = RunLock(job.run_dir, launch=asdict(member.launch))
    except ConfigError:
        if info.world > 1:
            refuse_own(registry, member, info.world, job.run_dir, ExitCode.CONFIG)
        raise
    lock.follow(run_dir)
    with lock:
        store = RendezvousStore(run_dir, lock.token)
        try:
            folder.make("logs")
            store.open()
            registry.wipe()
        except OSError as error:
            raise unwritable(job.run_dir, error) from error
        coordinator = Coordinator(
            store, registry, member, config, run_dir, info.world,
            RendezvousEndpoint.from_environment(environment, info.local_world == info.world), job.largest_world,
            Unfinished(run_dir, lock.token, job.steps),
        )  # fmt: skip
        membership = Membership(run_dir, job.run_dir, member, registry, store)
        return Supervisor(job, folder, config, info, environment, member, membership, lock, coordinator).run()


class Supervisor:
    """The loop of a rank's parent process. Rank 0's holds the run's lock and the coordinator."""

    def __init__(
        self, job: Job, folder: RunFolder, config: SuperviseConfig, info: RankInfo, environment: Mapping[str, str],
        member: Member, membership: Membership, lock: RunLock | None = None, coordinator: Coordinator | None = None,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._job, self._config, self._info, self._environment = job, config, info, environment
        self._member, self._membership, self._lock, self._coordinator = member, membership, lock, coordinator
        self._publisher = MetricsPublisher(job.observe, job.run_dir, self._member)
        self._worker: WorkerProcess | None = None
        self._exit_report: ExitReport | None = (
            None  # of this attempt; written again at each poll if its file is missing
        )
        self._attempt = 0
        self._above = [(each, " ".join(command_of(each.pid))[:80]) for each in processes_to_watch(info.world)]
        self._launcher_gone = ""
        self._stop_reason = 0  # the first signal or LAUNCHER_GONE; 0: no stop was requested
        self._signals: list[float] = []  # when; without SIGHUP, which never asks for a quick stop
        self._stop_seconds = 0.0
        self._spec: AttemptSpec | None = None
        self._spec_idle_seconds = 0.0
        self._unwritten_since: float | None = None  # since when the exit report cannot be written
        self._write_error = ""  # why an exit report of this attempt could not be written, even if that is over

    def run(self) -> int:
        """Follow the attempt specs until one has an exit code; return that."""
        previous = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        before, store_due = time.monotonic(), 0.0
        try:
            while True:
                now = time.monotonic()
                seconds, before = min(now - before, 1.0), now
                if self._worker is not None:
                    self._check_worker(self._worker, seconds)
                self._handle_stop(seconds)
                if self._lock is not None and not self._lock.beat():
                    return self._abort("another process has taken the lock of the run directory")
                self._spec_idle_seconds += seconds
                if now >= store_due or self._worker is None:
                    store_due = now + STORE_SECONDS
                    code = self._poll_store()
                    if code is not None:
                        return code
                    self._publisher.publish(
                        self._spec, self._attempt, self._worker, self._deadline_seconds(), int(self._is_stopping)
                    )
                time.sleep(POLL_SECONDS)
        finally:
            if self._worker is not None:
                self._worker.kill()
            self._publisher.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _poll_store(self) -> int | None:
        """Write the exit report, read the attempt spec and act on it. Return the exit code if the run is over."""
        now = self._folder.now
        if now is None:
            return self._abort_lost_folder()
        if now != self._folder.path:
            self._stop_reason = self._stop_reason or FOLDER_MOVED
        try:
            if self._exit_report is not None:
                self._membership.report_exit(self._attempt, self._exit_report)
            self._unwritten_since = None
        except OSError as error:  # a full disk: the next poll tries again
            self._write_error = str(error.strerror)
            if self._unwritten_since is None:
                self._unwritten_since = time.monotonic()
                _log.warning("rank %d: the supervisors' folder cannot be written (%s)", self._info.rank, error.strerror)
            elif time.monotonic() - self._unwritten_since > LOST_SECONDS:
                return self._abort(f"run_dir: {self._folder}: cannot be written ({error.strerror})", ExitCode.IO)
        if self._coordinator is not None:
            self._coordinator.stopping, self._coordinator.problem = self._is_stopping, self._folder.problem
            self._coordinator.poll()
        spec = self._read_attempt_spec()
        if spec is None and self._spec is None:
            code = self._refused()
            if code is not None:
                return code
        if spec is not None:
            if self._spec is not None and spec.members["0"] != self._spec.members["0"]:
                self._reset_for_new_coordinator()
            if spec != self._spec:
                self._spec, self._spec_idle_seconds = spec, 0.0
            if spec.code is not None:
                return spec.code
            if spec.ending and spec.attempt == self._attempt and self._worker is not None:
                self._end_worker(self._worker, "peer", dump=True)
            elif spec.attempt > self._attempt and not spec.ending:
                self._attempt, self._exit_report, self._write_error = spec.attempt, None, ""
                if self._info.rank in spec.order:
                    self._start(spec)
        has_begun = self._spec is not None and self._spec.attempt > 0
        patience = LOST_SECONDS if has_begun else self._config.start_seconds + LOST_SECONDS
        if self._spec_idle_seconds > patience:
            problem = self._membership.problem() or self._write_error  # rank 0 frees space when it exits
            if problem:
                return self._abort(f"run_dir: {self._folder}: cannot be written ({problem})", ExitCode.IO)
            return self._abort("rank 0's supervisor does not answer")
        return None

    def _read_attempt_spec(self) -> AttemptSpec | None:
        try:
            return self._membership.attempt_spec()
        except OSError as error:  # a full disk: the next poll announces again
            _log.warning("rank %d: %s", self._info.rank, error)
            return None

    def _refused(self) -> int | None:
        """Return the exit code if no attempt spec will list this rank; None while one may."""
        refusal = self._membership.refusal()
        if refusal is None:
            return ExitCode.CRASH if self._is_stopping and self._coordinator is None else None
        code, text = refusal
        if text:
            print(f"error: rank {self._info.rank}: {text}", file=sys.stderr, flush=True)
        return code

    def _reset_for_new_coordinator(self) -> None:
        """Forget the attempt: rank 0's supervisor was replaced and counts attempts from 1 again."""
        if self._worker is not None:
            self._end_worker(self._worker, "peer", dump=False)
        self._attempt, self._exit_report = 0, None

    def _start(self, spec: AttemptSpec) -> None:
        rank, world = spec.order.index(self._info.rank), len(spec.order)
        local_world = spec.hosts.count(self._member.host) if world < self._info.world else self._info.local_world
        kept = {name: value for name, value in self._environment.items() if not name.startswith(FOREIGN)}
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": self._info.local_rank}
        meeting = {"MASTER_ADDR": spec.address, "MASTER_PORT": spec.port}
        node = {"LOCAL_WORLD_SIZE": local_world, "LOCAL_SIZE": local_world, LAUNCHER_VARIABLE: self._info.source}
        with contextlib.suppress(OSError):
            self._folder.make("logs")  # a user may have deleted it during the launch
        stacks = (self._folder / "logs").absolute() / f"rank-{self._info.rank:03d}.stacks"
        heartbeat = Heartbeat.create()
        worker_spec = WorkerSpec(
            heartbeat.descriptor, spec.attempt, os.getpid(), str(stacks), spec.resume, self._publisher.path
        )
        environment = {**kept, **{name: str(value) for name, value in {**place, **meeting, **node}.items()}}
        self._worker = WorkerProcess(self._job.command, environment, worker_spec, heartbeat)
        if self._is_stopping:
            heartbeat.request_stop(self._stop_reason)

    def _check_worker(self, worker: WorkerProcess, seconds: float) -> None:
        """Report a worker that has ended by itself; end one that is past its deadline."""
        code = worker.poll(seconds)
        if code is not None:
            self._record_exit(worker, "exit", code)
        elif worker.idle_seconds > deadline_seconds(self._config, worker.state.phase):
            self._end_worker(worker, "stall", dump=True)

    def _end_worker(self, worker: WorkerProcess, cause: str, dump: bool) -> None:
        patience = min(FROZEN_SECONDS, deadline_seconds(self._config, worker.state.phase) / 2)
        frozen = worker.unresponsive_seconds > max(patience, 3 * ALIVE_SECONDS)
        if dump:
            state = worker.state
            worker.dump_stacks(f"attempt {self._attempt}, step {state.step}, phase {state.phase.label} ({cause})")
        self._record_exit(worker, cause, worker.kill(), frozen)

    def _record_exit(self, worker: WorkerProcess, cause: str, code: int, frozen: bool = False) -> None:
        state, failure = worker.heartbeat.read(), worker.heartbeat.failure()
        self._exit_report = ExitReport(
            self._info.rank, self._member.host, cause, code, int(state.phase), state.step, state.progress, frozen,
            failure is not None and failure.secondary, failure.text if failure is not None else self._launcher_gone,
            self._is_stopping,
        )  # fmt: skip
        self._publisher.count_end(self._exit_report)
        self._worker = None
        worker.heartbeat.close()

    def _deadline_seconds(self) -> float:
        return deadline_seconds(self._config, self._worker.state.phase) if self._worker is not None else 0.0

    @property
    def _is_stopping(self) -> bool:
        return self._stop_reason != 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stop_reason = self._stop_reason or number
        if number == HANGUP:  # the kernel, the shell and the launcher may each send one
            return
        now = time.monotonic()
        if not self._signals or now - self._signals[-1] > SAME_SIGNAL_SECONDS:
            self._signals.append(now)

    def _handle_stop(self, seconds: float) -> None:
        """Ask the rank to save and stop at the first signal. End it at the second one or after the grace period."""
        self._check_launcher()
        if not self._is_stopping or self._worker is None:
            return
        self._stop_seconds += seconds
        self._worker.heartbeat.request_stop(self._stop_reason)
        if len(self._signals) > 1:
            self._end_worker(self._worker, "exit", dump=False)
        elif self._stop_seconds > self._config.grace_seconds:
            self._end_worker(self._worker, "stall", dump=True)

    def _abort_lost_folder(self) -> int:
        """Return the exit code for a deleted run folder. The supervisors cannot agree any more; one per host reports it."""
        if self._info.local_rank == 0:
            print(f"error: {self._folder.problem}", file=sys.stderr, flush=True)
        return ExitCode.CONFIG

    def _check_launcher(self) -> None:
        """Request a stop if a process of the launcher is gone. This does not count as a signal."""
        if self._launcher_gone:
            return
        for process, command in self._above:
            if not process.is_running:
                self._launcher_gone = f"the launcher's process {process.pid} ({command}) is gone"
                self._stop_reason = self._stop_reason or LAUNCHER_GONE
                print(f"rank {self._info.rank}: {self._launcher_gone}; saving and leaving", file=sys.stderr, flush=True)
                return

    def _abort(self, why: str, code: ExitCode = ExitCode.CRASH) -> int:
        where = f"rank {self._info.rank}, host {self._member.host}"
        if self._worker is not None:
            where += f", step {self._worker.state.step}, phase {self._worker.state.phase.label}"
        print(f"FATAL {where}: {why}; next: none", file=sys.stderr, flush=True)
        return code


def deadline_seconds(config: SuperviseConfig, phase: Phase) -> float:
    """Return how many seconds a rank may take without progress in a phase."""
    return {
        Phase.START: config.start_seconds,
        Phase.FIRST_STEP: config.first_step_seconds,
        Phase.STEP: config.step_seconds,
        Phase.CHECKPOINT: config.checkpoint_seconds,
        Phase.SAMPLE: config.sample_seconds,
        Phase.END: config.grace_seconds,
    }[phase]
