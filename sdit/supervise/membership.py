"""How a rank's supervisor finds the plan of its own launch, and how it learns that its launch was refused."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from sdit.errors import ExitCode
from sdit.supervise.board import Board, Note, Plan, Waiting
from sdit.supervise.launch import LaunchMark
from sdit.supervise.lock import Holder, in_use, owner_of
from sdit.supervise.verdict import End

BEAT_SECONDS = 2.0
DOUBT_SECONDS = 2.0  # within it the lock's holder names its own ranks, also one that another launch refused by mistake
FOREIGN_SECONDS = 30.0  # if another launch holds the lock for longer, this rank's own rank 0 was refused
_log = logging.getLogger(__name__)


class Membership:
    """Rank 0's supervisor knows its own `board`. The others announce themselves until the lock holder's plan names them."""

    def __init__(self, run_dir: Path, shown: Path, note: Note, waiting: Waiting, board: Board | None = None) -> None:
        """`shown` is the run folder's path in messages; `run_dir` may lead to it by a descriptor."""
        self._shown = shown
        self._run_dir, self._note, self._waiting, self._board = run_dir, note, waiting, board
        self._announced = 0.0
        self._refused_since: float | None = None
        self._foreign: tuple[Holder, float] | None = None

    def plan(self) -> Plan | None:
        """Return the plan that names this rank; None while there is none. Raises: OSError."""
        plan = self._named_by(self._board)
        if plan is None:  # also when a new holder of the lock has removed the board
            found = ((board, self._named_by(board)) for board in Board.all_of(self._run_dir))
            self._board, plan = next(((board, plan) for board, plan in found if plan is not None), (self._board, None))
        if plan is None or plan.attempt == 0:
            self._announce()
        if plan is not None:
            self._refused_since = self._foreign = None
        return plan

    def _named_by(self, board: Board | None) -> Plan | None:
        """The board's plan, if it names this rank."""
        plan = None if board is None else board.plan()
        return plan if plan is not None and plan.names(self._note.rank, self._note.nonce) else None

    def post_end(self, attempt: int, end: End) -> None:
        """Say how this rank's attempt ended. Raises: OSError."""
        if self._board is not None:
            self._board.post_end(attempt, end)

    def problem(self) -> str:
        """Return why this rank cannot write to the folder of its launch; empty if it can, or has none."""
        return "" if self._board is None else self._board.problem(self._note)

    def refusal(self) -> tuple[int, str] | None:
        """Return exit code and message if no plan names this rank because its launch was refused; None if it must wait.

        The message is empty if rank 0 prints it.
        """
        now = time.monotonic()
        code = self._waiting.refusal(self._note)
        if code is not None:
            self._refused_since = self._refused_since or now
            if now - self._refused_since > DOUBT_SECONDS:
                return code, ""
        owner = owner_of(self._run_dir)
        if owner is None or _mark(owner).agrees_with(self._note.launch):
            self._foreign = None
        elif self._foreign is None or _token(self._foreign[0]) != _token(owner):
            self._foreign = owner, now
        elif owner.stamp != self._foreign[0].stamp and now - self._foreign[1] > FOREIGN_SECONDS:
            return ExitCode.CONFIG, str(in_use(self._shown, owner))
        return None

    def _announce(self) -> None:
        """Say that this rank is here, and go on saying so: the lock's next holder removes what was said before."""
        if self._note.rank == 0:
            return
        now = time.monotonic()
        if now - self._announced > BEAT_SECONDS or not self._waiting.holds(self._note):
            self._announced = now
            self._note = replace(self._note, beats=self._note.beats + 1)
            self._waiting.post(self._note)


def _token(owner: Holder | None) -> str:
    return owner.body["token"] if owner is not None else ""


def _mark(owner: Holder) -> LaunchMark:
    try:
        return LaunchMark(**owner.body["launch"])
    except (KeyError, TypeError):  # a lock of another version
        return LaunchMark("another version", "", "", "")
