"""The worker processes of one rank, one after the other: starts them, watches their heartbeats, ends them, reports their ends."""

from __future__ import annotations

import contextlib
import os

from sdit.config import SuperviseConfig
from sdit.launch_environment import LAUNCHER_VARIABLE
from sdit.supervise.heartbeat import ALIVE_SECONDS, Heartbeat, Phase, memory_file
from sdit.supervise.job import SupervisedRank
from sdit.supervise.log_files import append_to, log_path, mark_lines
from sdit.supervise.rendezvous import AttemptSpec
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.stop_request import StopRequest
from sdit.supervise.worker import KILL_SECONDS, StartWorker, WorkerProcess, WorkerSpec

FROZEN_SECONDS = 5.0  # ten alive
FOREIGN = ("TORCHELASTIC_",)  # with these, torch would look for torchrun's store instead of rank 0's


class RankWorker:
    """The worker process of a rank. `process` is None before the first attempt and after each. `attempt` is of the newest one."""

    def __init__(
        self, rank: SupervisedRank, folder: RunFolder, start_worker: StartWorker, stop: StopRequest, metrics_path: str
    ) -> None:
        self._rank, self._folder, self._start_worker = rank, folder, start_worker
        self._stop, self._metrics_path = stop, metrics_path
        self._stop_seconds = 0.0
        self.process: WorkerProcess | None = None
        self.attempt = 0

    @property
    def deadline_seconds(self) -> float:
        """How many seconds the process may take without progress now. It is 0 if there is none."""
        return deadline_seconds(self._rank.config, self.process.state.phase) if self.process is not None else 0.0

    def start(self, spec: AttemptSpec) -> None:
        """Start the process of an attempt."""
        with contextlib.suppress(OSError):
            self._folder.make("logs")  # a user may have deleted it during the launch
        heartbeat, stacks = Heartbeat.create(), memory_file("sdit-stacks")
        worker_spec = WorkerSpec(
            heartbeat.descriptor, spec.attempt, os.getpid(), stacks, spec.resume, self._metrics_path
        )
        environment = worker_environment(self._rank, spec)
        self.process = self._start_worker(self._rank.job.command, environment, worker_spec, heartbeat)
        self.attempt = spec.attempt
        if self._stop.is_set:
            heartbeat.request_stop(self._stop.reason)

    def poll(self, seconds: float) -> ExitReport | None:
        """Watch the process, `seconds` after the last call. Return the exit report of a process that has ended.

        A process past its deadline is ended. A stop that was requested is passed on.
        """
        report = None if self.process is None else self._check(self.process, seconds)
        self._stop.check_launcher()
        if self.process is not None and self._stop.is_set:
            self._request_stop(self.process, seconds)
        return report

    def end(self, cause: str, dump: bool) -> None:
        """Kill the process, unless it is killed already or there is none. `poll` reports it when it has ended."""
        process = self.process
        if process is None or process.is_killed:
            return
        patience = min(FROZEN_SECONDS, self.deadline_seconds / 2)
        frozen = process.unresponsive_seconds > max(patience, 3 * ALIVE_SECONDS)
        if dump:
            state = process.state
            title = f"attempt {self.attempt}, step {state.step}, phase {state.phase.label} ({cause})"
            self._save_stacks(process.dump_stacks(title))
        process.kill(cause, frozen)

    def close(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(KILL_SECONDS)
            self._save_stacks(self.process.take_stacks())

    def _check(self, process: WorkerProcess, seconds: float) -> ExitReport | None:
        """Return the exit report if the process has ended; end it if it is past its deadline."""
        code = process.poll(seconds)
        if code is not None:
            return self._report(process, code)
        if process.idle_seconds > self.deadline_seconds:
            self.end("stall", dump=True)
        return None

    def _report(self, process: WorkerProcess, code: int) -> ExitReport:
        state, failure = process.heartbeat.read(), process.heartbeat.failure()
        report = ExitReport(
            self._rank.info.rank, self._rank.member.host, process.end_cause, code, int(state.phase), state.step,
            state.progress, process.was_frozen, failure is not None and failure.secondary,
            failure.text if failure is not None else self._stop.launcher_gone, self._stop.is_set,
        )  # fmt: skip
        self._save_stacks(process.take_stacks())
        process.close()
        self.process = None
        return report

    def _request_stop(self, process: WorkerProcess, seconds: float) -> None:
        """Ask the rank to save and stop at the first signal. End it at the second one or after the grace period."""
        self._stop_seconds += seconds
        process.heartbeat.request_stop(self._stop.reason)
        if self._stop.is_urgent:
            self.end("exit", dump=False)
        elif self._stop_seconds > self._rank.config.grace_seconds:
            self.end("stall", dump=True)

    def _save_stacks(self, text: str) -> None:
        """Append stack dumps or a traceback of the worker to the file of rank 0 or of the node."""
        if text:
            with contextlib.suppress(OSError):  # a full disk: no dump
                path = log_path(self._folder / "logs", self._rank.info.rank, "stacks")
                append_to(path, mark_lines(text, self._rank.info.rank))


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


def worker_environment(rank: SupervisedRank, spec: AttemptSpec) -> dict[str, str]:
    """Return the supervisor's environment with the variables of a rank of the attempt, as a launcher would set them."""
    info, world = rank.info, len(spec.order)
    local_world = spec.hosts.count(rank.member.host) if world < info.world else info.local_world
    kept = {name: value for name, value in rank.environment.items() if not name.startswith(FOREIGN)}
    place = {"RANK": spec.order.index(info.rank), "WORLD_SIZE": world, "LOCAL_RANK": info.local_rank}
    rendezvous = {"MASTER_ADDR": spec.address, "MASTER_PORT": spec.port}
    node = {"LOCAL_WORLD_SIZE": local_world, "LOCAL_SIZE": local_world, LAUNCHER_VARIABLE: info.source}
    return {**kept, **{name: str(value) for name, value in {**place, **rendezvous, **node}.items()}}
