"""Which waiting ranks belong to the launch that holds the lock, and how the ranks of a refused launch are told to leave."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from sdit.supervise.board import Board, Note, Waiting
from sdit.supervise.launch import LaunchMark
from sdit.supervise.lock import owner_of

SILENT_SECONDS = 30.0  # a waiting rank that says nothing for so long is gone; NFS shows a change after a few seconds
UNSURE_SECONDS = 5.0  # by then a rank of another launch, which only its parent tells apart, has been refused
REFUSE_SECONDS = 10.0  # how long a refused rank 0 waits for ranks of its launch that start later
_log = logging.getLogger(__name__)


class Attendance:
    """The waiting ranks that were heard lately, in the order in which they came."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Note, float]] = {}
        self._came: dict[str, float] = {}

    def hear(self, notes: Iterable[Note], now: float) -> list[Note]:
        """Take in what the folder holds at `now` (seconds); return the ranks that are alive as far as can be seen."""
        present = {note.nonce: note for note in notes}
        for nonce, note in present.items():
            before = self._heard.get(nonce)
            if before is None or before[0].beats != note.beats:
                self._heard[nonce] = (note, now)
        self._heard = {
            nonce: (note, at)
            for nonce, (note, at) in self._heard.items()
            if now - at < SILENT_SECONDS and not note.is_dead
        }
        self._came = {nonce: self._came.get(nonce, now) for nonce in self._heard}
        return [note for note, _ in self._heard.values()]

    def patient(self, now: float) -> set[str]:
        """Return the nonces of the ranks that have waited for `UNSURE_SECONDS`."""
        return {nonce for nonce, came in self._came.items() if now - came > UNSURE_SECONDS}


def admit(
    members: Mapping[int, Note], candidates: Iterable[Note], world: int, patient: Collection[str] = ()
) -> dict[int, Note]:
    """Return the members of a launch of `world` ranks: those that are still there, then candidates for the free ranks.

    A candidate must agree with every member about the launch, and surely unless its nonce is among the `patient` ones.
    Rank 0 is a member already.
    """
    there = list(candidates)
    kept = {rank: note for rank, note in members.items() if rank == 0 or note.nonce in {each.nonce for each in there}}
    for note in there:
        free = 0 < note.rank < world and note.rank not in kept
        agrees = LaunchMark.agrees_with if note.nonce in patient else LaunchMark.surely_agrees_with
        if free and all(agrees(note.launch, member.launch) for member in kept.values()):
            kept[note.rank] = note
    return kept


def refuse_own(waiting: Waiting, me: Note, world: int, run_dir: Path, code: int) -> None:
    """Tell the other ranks of a launch whose rank 0 (`me`) was refused to leave with `code`.

    Ranks that the plan of the lock's holder names are not of this launch.
    """
    deadline, told = time.monotonic() + REFUSE_SECONDS, set[str]()
    while len(told) < world - 1 and time.monotonic() < deadline:
        taken = named_by_owner(run_dir)
        for note in waiting.notes():
            if note.nonce in taken or not note.launch.agrees_with(me.launch):
                continue
            try:
                if waiting.refusal(note) is None:  # also if a new holder of the lock has removed it
                    waiting.refuse(note, code)
                else:
                    told.add(note.nonce)
            except OSError as error:
                _log.warning("rank %d could not be told to leave: %s", note.rank, error)
        time.sleep(0.1)


def named_by_owner(run_dir: Path) -> set[str]:
    """Return the nonces that the plan of the lock's holder names."""
    owner = owner_of(run_dir)
    board = Board.of_token(run_dir, owner.body["token"]) if owner is not None else None
    plan = board.plan() if board is not None else None
    return set(plan.members.values()) if plan is not None else set()
