"""The metrics publisher of a supervisor. It writes the rank's status. On the first rank of a node it runs the exporter.

It never raises. If metrics cannot be published, the supervisor logs it once and the run continues.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.config import ObserveConfig
from sdit.metrics.shared_file import RankStatus, SharedMetricsFile, remove_abandoned_files, shared_path
from sdit.supervise.heartbeat import Phase
from sdit.supervise.members import Member
from sdit.supervise.rendezvous import AttemptSpec
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.worker import WorkerProcess

if TYPE_CHECKING:
    from sdit.metrics.exporter import Exporter

STATES = {
    Phase.START: "starting",
    Phase.FIRST_STEP: "starting",
    Phase.STEP: "training",
    Phase.CHECKPOINT: "checkpointing",
    Phase.SAMPLE: "sampling",
    Phase.END: "ended",
}
_log = logging.getLogger(__name__)


class MetricsPublisher:
    """Writes the rank's shared metrics file.

    The file is created before the rank announces itself, so that all files exist at the first attempt.
    """

    def __init__(self, config: ObserveConfig | None, run_dir: Path, member: Member) -> None:
        self._run_dir, self._member = run_dir, member
        self._exporter: Exporter | None = None
        self._file: SharedMetricsFile | None = None
        self._spec: AttemptSpec | None = None
        now = time.monotonic()
        self._status = RankStatus(
            member.rank, False, 0, "starting", 0.0, now, now, now, ends={"exit": 0, "stall": 0, "peer": 0}
        )
        if config is None or (config.metrics_port is None and config.pushgateway is None):
            return
        self._config = config
        try:
            remove_abandoned_files()
            self._file = SharedMetricsFile.create(member.nonce)
        except OSError as error:
            _log.warning("rank %d: no metrics: %s", member.rank, error)

    @property
    def path(self) -> str:
        """The path of the rank's shared metrics file. It is empty if metrics are off."""
        return str(self._file.path) if self._file is not None else ""

    def count_end(self, report: ExitReport) -> None:
        """Count an ended process of the rank."""
        ends = {**self._status.ends, report.cause: self._status.ends[report.cause] + 1}
        state = "ended" if report.is_clean else "restarting"
        self._status = replace(self._status, is_up=False, state=state, ends=ends)

    def publish(
        self, spec: AttemptSpec | None, attempt: int, worker: WorkerProcess | None, deadline_seconds: float, stops: int
    ) -> None:
        """Write the rank's status, and restart the exporter's threads if they have ended.

        `stops` counts the stop requests.
        """
        if self._file is None:
            return
        now = time.monotonic()
        self._status = replace(self._status, written_at=now, restarts=max(0, attempt - 1), preemptions=min(stops, 1))
        if worker is not None:
            state = "stopping" if stops else STATES[worker.state.phase]
            progress_at, alive_at = now - worker.idle_seconds, now - worker.unresponsive_seconds
            self._status = replace(
                self._status, is_up=True, step=worker.state.step, state=state, deadline_seconds=deadline_seconds,
                progress_at=progress_at, alive_at=alive_at,
            )  # fmt: skip
        try:
            self._file.write_status(self._status)
            if spec is not None and spec.order:
                self._serve(spec)
        except (OSError, RuntimeError) as error:  # shared memory is full, or the system has no more threads
            _log.warning("rank %d: writes no more metrics: %s", self._member.rank, error)
            self._remove_file()

    def close(self) -> None:
        """Stop the exporter and remove the shared metrics file."""
        if self._exporter is not None:
            try:
                if self._file is not None:
                    self._file.write_status(replace(self._status, is_up=False, state="ended"))
            except OSError as error:
                _log.warning("rank %d: %s", self._member.rank, error)
            self._exporter.close()
        self._remove_file()

    def _serve(self, spec: AttemptSpec) -> None:
        """Run the exporter if this rank is the first local one.

        That may change with each attempt, because ranks can be lost.
        """
        is_new = self._spec is None or spec.attempt > self._spec.attempt
        self._spec = spec
        if self._exporter is not None:
            self._exporter.check()
        elif is_new and self._file is not None and self._local_files()[:1] == [self._file.path]:
            from sdit.metrics.exporter import Exporter  # only here: other supervisors start faster without it

            self._exporter = Exporter(self._run_dir, self._config, self._member.host, self._local_files)

    def _local_files(self) -> list[Path]:
        """Return the existing files of the attempt's ranks. Ranks on other machines have none here."""
        spec = self._spec
        if spec is None:
            return []
        return [path for rank in spec.order if (path := shared_path(spec.members[str(rank)])).exists()]

    def _remove_file(self) -> None:
        if self._file is None:
            return
        self._file.close()
        try:
            self._file.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s: %s", self._file.path, error)
        self._file = None
