"""What rank 0's supervisor does beyond its own rank: gathers the ranks, starts attempts, decides what follows them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sdit.config import SuperviseConfig
from sdit.errors import ExitCode
from sdit.supervise.admission import Attendance, admit
from sdit.supervise.board import Board, Note, Plan, Waiting
from sdit.supervise.unfinished import Unfinished, clear
from sdit.supervise.verdict import REFUSED, End, Judge, Verdict, culprit

BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # a supervisor that says nothing for so long is gone; NFS shows a change after a few seconds
_log = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"images-\d{12}")


@dataclass(frozen=True)
class Meeting:
    """Where the launcher said that the ranks meet, if it said so."""

    address: str
    port: int | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], one_node: bool) -> Meeting:
        port = environment.get("MASTER_PORT", "")
        address = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
        return cls(address, int(port) if port.isdecimal() else None)


class Leader:
    """Posts plans. `largest_world(n)` is the largest number of ranks, up to n, that the config can run on (0: none)."""

    def __init__(
        self, board: Board, waiting: Waiting, note: Note, config: SuperviseConfig, run_dir: Path, world: int,
        meeting: Meeting, largest_world: Callable[[int], int], unfinished: Unfinished,
    ) -> None:  # fmt: skip
        self._board, self._waiting, self._unfinished = board, waiting, unfinished
        self._config, self._run_dir, self._world = config, run_dir, world
        self._meeting, self._largest_world = meeting, largest_world
        self._judge = Judge(config.restarts, config.stop_code)
        self._notes: dict[int, Note] = {0: note}
        self._attendance = Attendance()
        self._plan = Plan(attempt=0, members={"0": note.nonce})
        self._since = self._beaten = time.monotonic()
        self._reached_first_step = False
        self._is_posted = True
        self.stopping = False
        self.problem = ""  # of the run folder, which is no longer at its path

    def poll(self) -> None:
        """One look at the board, and the next thing to do."""
        if self._plan.code is None:
            if self._plan.attempt == 0:
                self._gather()
            else:
                self._follow()
        is_due = self._plan.code is None and time.monotonic() - self._beaten > BEAT_SECONDS
        if is_due or not self._is_posted or not self._board.has_plan:
            self._post(beats=self._plan.beats + 1)

    def finish(self, code: int, text: str = "") -> None:
        """End the run on all ranks with one exit code and, unless it went well, one line."""
        if text:
            print("error:" if code in REFUSED else "FATAL", text, file=sys.stderr, flush=True)
        self._post(code=code)

    def _give_up(self, code: int, text: str) -> None:
        """End the run, which is not complete, for a reason that no attempt gave."""
        self._unfinished.end(code, text)
        self.finish(code, text)

    def _leave_mark(self, ends: Mapping[int, End], verdict: Verdict) -> None:
        """Say in the run directory whether the run is complete, or why it is not."""
        if all(end.is_clean and end.code == ExitCode.DONE for end in ends.values()):
            clear(self._run_dir)
            return
        why = verdict.text or _stop_reason(ends) or "a stop was asked for"
        self._unfinished.end(verdict.code, why, max(end.step for end in ends.values()))

    def _gather(self) -> None:
        """Wait for every rank's supervisor, then start the first attempt."""
        now = time.monotonic()
        there = self._attendance.hear(self._waiting.notes(), now)
        self._notes = admit(self._notes, there, self._world, self._attendance.patient(now))
        members = {str(rank): note.nonce for rank, note in self._notes.items()}
        if members != self._plan.members:
            self._post(members=members)  # a rank that is named here belongs to this launch and no other
        if len(self._notes) < self._world:
            if time.monotonic() - self._since > self._config.start_seconds:
                missing = [str(rank) for rank in range(self._world) if rank not in self._notes]
                text = f"rank {', '.join(missing)} of {self._world} did not start within {self._config.start_seconds} s"
                self._give_up(ExitCode.CRASH, f"{text}; next: none, look at the launcher's log of it")
            elif self.stopping:
                self._give_up(ExitCode.CRASH, "stopped before all ranks were there")
            return
        different = [note for note in self._notes.values() if note.digest != self._notes[0].digest]
        if different:
            text = f"rank {different[0].rank}, host {different[0].host}: was started with another config than rank 0"
            self._give_up(ExitCode.CONFIG, f"{text}; legal: the same command and files for all ranks")
            return
        self._judge.begin(self._newest_checkpoint())
        self._start(tuple(range(self._world)))

    def _follow(self) -> None:
        """Watch a running attempt: the first bad end ends it for all, the last end decides what comes next."""
        ends = {rank: end for rank, end in self._board.ends(self._plan.attempt).items() if rank in self._plan.order}
        if any(not end.is_clean for end in ends.values()) and not self._plan.ending:
            self._since = time.monotonic()
            self._post(ending=True)
        if len(ends) < len(self._plan.order):
            if not self._plan.ending or time.monotonic() - self._since < LOST_SECONDS:
                return
            ends |= {rank: self._lost(rank, ends) for rank in self._plan.order if rank not in ends}
        self._reached_first_step |= any(end.step > 0 or end.phase > 0 for end in ends.values())
        verdict = self._judge.decide(ends, self._newest_checkpoint(), self.stopping)
        if self.problem:  # whatever the ranks met: another attempt, or launch, would begin a new run at the old path
            verdict = Verdict(False, ExitCode.CONFIG, self.problem)
        self._record(ends, verdict)
        if not verdict.restart:
            self._leave_mark(ends, verdict)
            self.finish(verdict.code, verdict.text)
            return
        print(f"FATAL {verdict.text}", file=sys.stderr, flush=True)
        self._go_on(tuple(rank for rank in self._plan.order if ends[rank].cause != "lost"))

    def _go_on(self, left: tuple[int, ...]) -> None:
        """Start the next attempt on the ranks that are left, if that is all of them or the run is elastic."""
        if len(left) == len(self._plan.order):
            self._start(left)
            return
        world = self._largest_world(len(left)) if self._config.elastic else 0
        if world == 0:
            need = "supervise.elastic: true would go on without it" if not self._config.elastic else "too few are left"
            lost = f"{len(self._plan.order) - len(left)} of {len(self._plan.order)} ranks are lost"
            self._give_up(ExitCode.CRASH, f"{lost}; {need}; next: none")
            return
        _log.warning("going on with %d of %d ranks", world, len(self._plan.order))
        self._start(left[:world])

    def _start(self, order: tuple[int, ...]) -> None:
        attempt = self._plan.attempt + 1
        newest = self._newest_checkpoint()
        self._since = time.monotonic()
        self._plan = Plan(
            attempt=attempt,
            members={str(rank): note.nonce for rank, note in self._notes.items()},
            order=order,
            hosts=tuple(self._notes[rank].host for rank in order),
            address=self._meeting.address,
            port=free_port(self._meeting.port if attempt == 1 else None),
            resume="auto" if self._reached_first_step and newest else None,
        )
        self._post()

    def _post(self, **changes: object) -> None:
        self._beaten = time.monotonic()
        self._plan = replace(self._plan, **changes)  # type: ignore[arg-type]
        try:
            self._board.post_plan(self._plan)
        except OSError as error:  # a full disk: the next look tries again
            if self._is_posted:
                _log.warning("the supervisors' plan cannot be written (%s); the run continues", error.strerror)
            self._is_posted = False
            if self._plan.code is None:  # the last plan is not waited for without an end
                with contextlib.suppress(OSError):
                    self._board.beat()
            return
        self._is_posted = True

    def _lost(self, rank: int, others: Mapping[int, End]) -> End:
        """The end of a rank that reported none. All ranks take the same steps, so the others know how far it was."""
        known = max(others.values(), key=lambda end: end.step, default=None)
        step, phase = (known.step, known.phase) if known is not None else (0, 0)
        return End(rank, self._notes[rank].host, "lost", ExitCode.CRASH, phase, step)

    def _newest_checkpoint(self) -> str:
        folder = self._run_dir / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return max((name for name in names if _CHECKPOINT.fullmatch(name)), default="")

    def _record(self, ends: Mapping[int, End], verdict: Verdict) -> None:
        """One line per attempt in logs/attempts.jsonl."""
        fault = culprit(list(ends.values()))
        body = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": self._plan.attempt,
            "ranks": len(self._plan.order),
            **{key: value for key, value in asdict(fault).items() if key in ("rank", "host", "step", "cause", "code")},
            "restart": verdict.restart,
            "exit_code": verdict.code,
            "text": verdict.text or _stop_reason(ends),
        }
        try:
            (self._run_dir / "logs").mkdir(exist_ok=True)  # somebody may have removed it under a running launch
            with (self._run_dir / "logs" / "attempts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(body) + "\n")
        except OSError as error:
            _log.warning("logs/attempts.jsonl: %s", error)


def _stop_reason(ends: Mapping[int, End]) -> str:
    """Why the ranks stopped, if one of them knows."""
    return next((end.text for end in ends.values() if end.text), "")


def free_port(wanted: int | None) -> int:
    """`wanted` if it is free on this host, else any free port."""
    for port in (wanted, 0):
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                _log.warning("port %d is in use; the ranks meet at another one", port)
                continue
            return int(probe.getsockname()[1])
    raise OSError("this host has no free port")
