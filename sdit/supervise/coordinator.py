"""The coordinator: rank 0's supervisor collects the members, starts attempts and decides the next action after each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sdit.errors import ExitCode
from sdit.supervise.admission import Attendance, admit
from sdit.supervise.endpoint import free_port, launch_endpoint
from sdit.supervise.job import SupervisedRank
from sdit.supervise.members import Member, MemberRegistry
from sdit.supervise.rendezvous import AttemptSpec, RendezvousStore
from sdit.supervise.restart_policy import REFUSED, Decision, ExitReport, RestartPolicy, root_cause
from sdit.supervise.unfinished import Unfinished, clear

HEARTBEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # a supervisor that reports nothing for this long is lost; NFS shows a change after a few seconds
_log = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"images-\d{12}")


class Coordinator:
    """Publishes attempt specs. It logs how the last launch ended, and writes that this one has begun."""

    def __init__(self, rank: SupervisedRank, store: RendezvousStore, registry: MemberRegistry, run_dir: Path) -> None:
        self._store, self._registry, self._run_dir = store, registry, run_dir
        self._config, self._world, self._largest_world = rank.config, rank.info.world, rank.job.largest_world
        self._unfinished = Unfinished(run_dir, store.token, rank.job.steps)
        one_node = rank.info.local_world == self._world
        self._address, self._port = launch_endpoint(rank.environment, one_node)
        self._policy = RestartPolicy(rank.config.restarts, rank.config.stop_code)
        self._members: dict[int, Member] = {0: rank.member}
        self._attendance = Attendance()
        self._spec = AttemptSpec(attempt=0, members={"0": rank.member.nonce})
        self._since = self._published_at = time.monotonic()
        self._first_report_at: float | None = None  # when rank 0 had the first exit report of the attempt
        self._reached_first_step = False
        self._is_published = True
        self.stopping = False
        self.problem = ""  # the reason why the run folder is no longer at its path, else empty

    def poll(self) -> None:
        """Read the store once and take the next action."""
        if self._spec.code is None:
            if self._spec.attempt == 0:
                self._collect_members()
            else:
                self._watch_attempt()
        if not self._is_published or not self._store.has_attempt_spec:
            self._publish()
        elif self._spec.code is None and time.monotonic() - self._published_at > HEARTBEAT_SECONDS:
            self._beat()

    def finish(self, code: int, text: str = "") -> None:
        """End the run on all ranks with one exit code and, if it failed, one line."""
        if text:
            print("error:" if code in REFUSED else "FATAL", text, file=sys.stderr, flush=True)
        self._publish(code=code)

    def _end_incomplete(self, code: int, text: str) -> None:
        """End the incomplete run for a reason that is not in an exit report."""
        self._unfinished.end(code, text)
        self.finish(code, text)

    def _write_outcome(self, exit_reports: Mapping[int, ExitReport], decision: Decision) -> None:
        """Write to the run directory that the run is complete, or the reason why it is not."""
        if all(report.is_clean and report.code == ExitCode.DONE for report in exit_reports.values()):
            clear(self._run_dir)
            return
        why = decision.text or _stop_reason(exit_reports) or "a stop was requested"
        self._unfinished.end(decision.code, why, max(report.step for report in exit_reports.values()))

    def _collect_members(self) -> None:
        """Wait for the supervisor of each rank, then start the first attempt."""
        now = time.monotonic()
        there = self._attendance.update(self._registry.members(), now)
        self._members = admit(self._members, there, self._world, self._attendance.settled(now))
        members = {str(rank): member.nonce for rank, member in self._members.items()}
        if members != self._spec.members:
            self._publish(members=members)  # a rank that is listed here belongs to this launch only
        if len(self._members) < self._world:
            if time.monotonic() - self._since > self._config.start_seconds:
                missing = [str(rank) for rank in range(self._world) if rank not in self._members]
                text = f"rank {', '.join(missing)} of {self._world} did not start within {self._config.start_seconds} s"
                self._end_incomplete(ExitCode.CRASH, f"{text}; next: none, see the launcher's log of this rank")
            elif self.stopping:
                self._end_incomplete(ExitCode.CRASH, "stopped before all ranks were present")
            return
        different = [member for member in self._members.values() if member.digest != self._members[0].digest]
        if different:
            text = f"rank {different[0].rank}, host {different[0].host}: was started with another config than rank 0"
            self._end_incomplete(ExitCode.CONFIG, f"{text}; legal: the same command and files for all ranks")
            return
        self._policy.begin(self._newest_checkpoint())
        self._start(tuple(range(self._world)))

    def _watch_attempt(self) -> None:
        """Watch an attempt. The first failure ends it on all ranks. The policy decides when all ranks have reported."""
        reports = self._store.exit_reports(self._spec.attempt)
        exit_reports = {rank: report for rank, report in reports.items() if rank in self._spec.order}
        if any(not report.is_clean for report in exit_reports.values()) and not self._spec.ending:
            self._since = time.monotonic()
            self._publish(ending=True)
        if len(exit_reports) < len(self._spec.order):
            if not self._is_overdue(exit_reports):
                return
            lost = [rank for rank in self._spec.order if rank not in exit_reports]
            exit_reports |= {rank: self._lost_report(rank, exit_reports) for rank in lost}
        self._reached_first_step |= any(report.step > 0 or report.phase > 0 for report in exit_reports.values())
        decision = self._policy.decide(exit_reports, self._newest_checkpoint(), self.stopping)
        if self.problem:  # another attempt would start a new run at the old path
            decision = Decision(False, ExitCode.CONFIG, self.problem)
        self._log_attempt(exit_reports, decision)
        if not decision.restart:
            self._write_outcome(exit_reports, decision)
            self.finish(decision.code, decision.text)
            return
        print(f"FATAL {decision.text}", file=sys.stderr, flush=True)
        self._restart(tuple(rank for rank in self._spec.order if exit_reports[rank].cause != "lost"))

    def _is_overdue(self, exit_reports: Mapping[int, ExitReport]) -> bool:
        """Return whether the missing exit reports are lost.

        All ranks end together. After a clean end, each supervisor ends its worker within `grace_seconds`. A supervisor that was
        killed after its worker had ended reports nothing. Rank 0's own report is never lost: this process writes it when its
        worker has ended, which can take long after a kill.
        """
        now = time.monotonic()
        if 0 in self._spec.order and 0 not in exit_reports:
            return False
        if self._spec.ending:
            return now - self._since >= LOST_SECONDS
        if not exit_reports:
            return False
        self._first_report_at = self._first_report_at or now
        return now - self._first_report_at >= self._config.grace_seconds + LOST_SECONDS

    def _restart(self, left: tuple[int, ...]) -> None:
        """Start the next attempt on the remaining ranks, if these are all ranks or the run is elastic."""
        if len(left) == len(self._spec.order):
            self._start(left)
            return
        world = self._largest_world(len(left)) if self._config.elastic else 0
        if world == 0:
            without = "supervise.elastic: true would continue without them"
            need = "too few ranks remain" if self._config.elastic else without
            lost = f"{len(self._spec.order) - len(left)} of {len(self._spec.order)} ranks are lost"
            self._end_incomplete(ExitCode.CRASH, f"{lost}; {need}; next: none")
            return
        _log.warning("continuing with %d of %d ranks", world, len(self._spec.order))
        self._start(left[:world])

    def _start(self, order: tuple[int, ...]) -> None:
        attempt = self._spec.attempt + 1
        newest = self._newest_checkpoint()
        self._since, self._first_report_at = time.monotonic(), None
        self._spec = AttemptSpec(
            attempt=attempt,
            members={str(rank): member.nonce for rank, member in self._members.items()},
            order=order,
            hosts=tuple(self._members[rank].host for rank in order),
            address=self._address,
            port=free_port(self._port if attempt == 1 else None),
            resume="auto" if self._reached_first_step and newest else None,
        )
        self._publish()

    def _publish(self, **changes: object) -> None:
        self._published_at = time.monotonic()
        self._spec = replace(self._spec, **changes)  # type: ignore[arg-type]
        try:
            self._store.publish(self._spec)
        except OSError as error:  # a full disk; the next poll tries again
            if self._is_published:
                _log.warning("the attempt spec cannot be written (%s); the run continues", error.strerror)
            self._is_published = False
            if self._spec.code is None:  # the wait for the final attempt spec has a limit
                self._beat()
            return
        self._is_published = True

    def _beat(self) -> None:
        """Show that this process is alive. If the folder is gone, the next poll writes it again."""
        self._published_at = time.monotonic()
        with contextlib.suppress(OSError):
            self._store.beat()

    def _lost_report(self, rank: int, others: Mapping[int, ExitReport]) -> ExitReport:
        """Return an exit report for a rank that sent none.

        All ranks take the same steps, so its step is that of the other ranks.
        """
        known = max(others.values(), key=lambda report: report.step, default=None)
        step, phase = (known.step, known.phase) if known is not None else (0, 0)
        return ExitReport(rank, self._members[rank].host, "lost", ExitCode.CRASH, phase, step)

    def _newest_checkpoint(self) -> str:
        folder = self._run_dir / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return max((name for name in names if _CHECKPOINT.fullmatch(name)), default="")

    def _log_attempt(self, exit_reports: Mapping[int, ExitReport], decision: Decision) -> None:
        """Append one line per attempt to logs/attempts.jsonl."""
        fault = root_cause(list(exit_reports.values()))
        body = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": self._spec.attempt,
            "ranks": len(self._spec.order),
            **{key: getattr(fault, key) for key in ("rank", "host", "cause", "code", "step")},
            "restart": decision.restart,
            "exit_code": decision.code,
            "text": decision.text or _stop_reason(exit_reports),
        }
        try:
            (self._run_dir / "logs").mkdir(exist_ok=True)  # a user may have deleted it during the launch
            with (self._run_dir / "logs" / "attempts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(body) + "\n")
        except OSError as error:
            _log.warning("logs/attempts.jsonl: %s", error)


def _stop_reason(exit_reports: Mapping[int, ExitReport]) -> str:
    """Return the reason why the ranks stopped, or an empty string if no rank reported one."""
    return next((report.text for report in exit_reports.values() if report.text), "")
