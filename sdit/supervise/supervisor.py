"""The supervisor of one rank: starts the worker process, watches its heartbeat, ends it on request, reports how it ended."""

from __future__ import annotations

import logging
import math
import sys
import time

from sdit.errors import ExitCode
from sdit.supervise.coordinator import LOST_SECONDS, Coordinator
from sdit.supervise.heartbeat import FOLDER_MOVED
from sdit.supervise.job import SupervisedRank
from sdit.supervise.lock import RunLock
from sdit.supervise.membership import Membership
from sdit.supervise.metrics_publisher import MetricsPublisher
from sdit.supervise.rank_worker import RankWorker
from sdit.supervise.read_schedule import STORE_SECONDS, read_seconds, store_seconds
from sdit.supervise.rendezvous import AttemptSpec
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.stop_request import StopRequest
from sdit.supervise.worker import StartWorker

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.1


class Supervisor:
    """The loop of a rank's parent process. Rank 0's holds the run's lock and the coordinator."""

    def __init__(
        self, rank: SupervisedRank, folder: RunFolder, membership: Membership, start_worker: StartWorker,
        lock: RunLock | None = None, coordinator: Coordinator | None = None,
    ) -> None:  # fmt: skip
        self._rank, self._folder, self._membership, self._lock, self._coordinator = (
            rank, folder, membership, lock, coordinator
        )  # fmt: skip
        self._config, self._info, self._member = rank.config, rank.info, rank.member
        self._publisher = MetricsPublisher(rank.job.observe, rank.job.run_dir, rank.member)
        self._stop = StopRequest(rank.info)
        self._worker = RankWorker(rank, folder, start_worker, self._stop, self._publisher.path)
        self._attempt = 0
        self._exit_report: ExitReport | None = None  # of this attempt; written again if its file is missing
        self._spec: AttemptSpec | None = None
        self._spec_idle_seconds = 0.0
        self._unwritten_since: float | None = None  # since when the exit report cannot be written
        self._write_error = ""  # why an exit report of this attempt could not be written, even if that is over
        self._before = time.monotonic()  # of the last poll
        self._polled_at = -math.inf  # when this process looked for a new attempt spec
        self._read_at = -math.inf  # when it read the store

    def run(self) -> int:
        """Follow the attempt specs until one has an exit code; return that."""
        with self._stop:
            try:
                while True:
                    code = self.poll()
                    if code is not None:
                        return code
                    time.sleep(POLL_SECONDS)
            finally:
                self.close()

    def poll(self) -> int | None:
        """Watch the worker, and follow a new attempt spec if there is one. Return the exit code if the run is over."""
        now = time.monotonic()
        seconds, self._before = min(now - self._before, 1.0), now
        report = self._worker.poll(seconds)
        if report is not None:
            self._record(report)
        if self._lock is not None and not self._lock.beat():
            return self._abort("another process has taken the lock of the run directory")
        self._spec_idle_seconds += seconds
        if now - self._polled_at < (STORE_SECONDS if self._worker.process is not None else 0.0):
            return None
        code = None
        copied = self._copied_spec(now)
        if copied is not None:
            code = self._follow_or_wait(copied)
        elif now - self._read_at >= self._store_seconds():
            self._read_at = now
            code = self._poll_store()
        else:
            return None
        self._polled_at = now
        if code is None:
            self._publish()
        return code

    def close(self) -> None:
        """End the worker, if there is one, and free what this process shares with others."""
        self._worker.close()
        self._membership.discard_copy()
        self._publisher.close()

    def _store_seconds(self) -> float:
        """Return the seconds between two reads of the store by this process, or by its node if reads are shared."""
        has_worker, shares_reads = self._worker.process is not None, self._membership.shares_reads
        return read_seconds(self._info, has_worker, self._coordinator is not None, shares_reads)

    def _copied_spec(self, now: float) -> AttemptSpec | None:
        """Return the attempt spec that a supervisor of this node has read recently, if this process need not read the store.

        It must read the store if it coordinates, announces itself, or has an exit report, which it writes again if it is missing.
        """
        if self._coordinator is not None or self._spec is None or self._spec.attempt == 0:
            return None
        if self._exit_report is not None and now - self._read_at >= store_seconds(self._info.world, has_worker=False):
            return None
        return self._membership.copied_spec(self._store_seconds())

    def _publish(self) -> None:
        worker = self._worker
        stops = int(self._stop.is_set)
        self._publisher.publish(self._spec, self._attempt, worker.process, worker.deadline_seconds, stops)

    def _record(self, report: ExitReport) -> None:
        """Count a worker that has ended. Its report is written at once if it is of this attempt."""
        self._publisher.count_end(report)
        if self._worker.attempt == self._attempt:
            self._exit_report, self._read_at = report, -math.inf

    def _poll_store(self) -> int | None:
        """Write the exit report, read the attempt spec and act on it. Return the exit code if the run is over."""
        now = self._folder.now
        if now != self._folder.path:
            self._membership.discard_copy()
        if now is None:
            return self._abort_lost_folder()
        if now != self._folder.path:
            self._stop.request(FOLDER_MOVED)
        code = self._write_exit_report()
        if code is not None:
            return code
        if self._coordinator is not None:
            self._coordinator.stopping, self._coordinator.problem = self._stop.is_set, self._folder.problem
            self._coordinator.poll()
        return self._follow_or_wait(self._read_attempt_spec())

    def _follow_or_wait(self, spec: AttemptSpec | None) -> int | None:
        """Follow the attempt spec that was read, if there is one. Return the exit code if the run is over."""
        code = None
        if spec is not None:
            code = self._follow(spec)
        elif self._spec is None:
            code = self._refused()
        return code if code is not None else self._check_coordinator()

    def _write_exit_report(self) -> int | None:
        """Write the exit report, if there is one. Return the exit code if that failed for too long."""
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
        return None

    def _follow(self, spec: AttemptSpec) -> int | None:
        """Start or end the worker as an attempt spec asks. Return the exit code if the spec has one."""
        if self._spec is not None and spec.members["0"] != self._spec.members["0"]:
            # Rank 0's supervisor was replaced and counts attempts from 1 again.
            self._worker.end("peer", dump=False)
            self._attempt, self._exit_report = 0, None
        if spec != self._spec:
            self._spec, self._spec_idle_seconds = spec, 0.0
        if spec.code is not None:
            return spec.code
        if spec.ending and spec.attempt == self._attempt:
            self._worker.end("peer", dump=True)
        elif spec.attempt > self._attempt and not spec.ending and self._worker.process is None:
            self._attempt, self._exit_report, self._write_error = spec.attempt, None, ""
            if self._info.rank in spec.order:
                self._worker.start(spec)
        return None

    def _check_coordinator(self) -> int | None:
        """Return the exit code if rank 0's supervisor has not answered for too long."""
        has_begun = self._spec is not None and self._spec.attempt > 0
        patience = LOST_SECONDS if has_begun else self._config.start_seconds + LOST_SECONDS
        if self._spec_idle_seconds <= patience:
            return None
        problem = self._membership.problem() or self._write_error  # rank 0 frees space when it exits
        if problem:
            return self._abort(f"run_dir: {self._folder}: cannot be written ({problem})", ExitCode.IO)
        return self._abort("rank 0's supervisor does not answer")

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
            return ExitCode.CRASH if self._stop.is_set and self._coordinator is None else None
        code, text = refusal
        if text:
            print(f"error: rank {self._info.rank}: {text}", file=sys.stderr, flush=True)
        return code

    def _abort_lost_folder(self) -> int:
        """Return the exit code for a deleted run folder. The supervisors cannot agree any more; one per host reports it."""
        if self._info.local_rank == 0:
            print(f"error: {self._folder.problem}", file=sys.stderr, flush=True)
        return ExitCode.CONFIG

    def _abort(self, why: str, code: ExitCode = ExitCode.CRASH) -> int:
        where = f"rank {self._info.rank}, host {self._member.host}"
        if self._worker.process is not None:
            state = self._worker.process.state
            where += f", step {state.step}, phase {state.phase.label}"
        print(f"FATAL {where}: {why}; next: none", file=sys.stderr, flush=True)
        return code
