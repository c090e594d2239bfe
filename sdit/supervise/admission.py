"""Selects the waiting ranks of the launch that holds the lock, and notifies the ranks of a refused launch."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.lock import owner_of
from sdit.supervise.members import Member, MemberRegistry
from sdit.supervise.rendezvous import RendezvousStore

# A waiting rank that reports nothing for this long is lost. NFS shows a change after a few seconds.
SILENT_SECONDS = 30.0
UNSURE_SECONDS = 5.0  # by then the rank 0 of another launch has refused its ranks
REFUSE_SECONDS = 10.0  # a refused rank 0 waits this long for ranks of its launch that start later
_log = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """A waiting rank, and the times of its first announcement and of its latest sign of life, in seconds."""

    member: Member
    first: float
    latest: float


class Attendance:
    """The waiting ranks that announced themselves recently, in order of arrival."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}  # by nonce

    def update(self, members: Iterable[Member], now: float) -> list[Member]:
        """Add the members announced at time `now` (seconds), and return those that seem alive."""
        for member in members:
            before = self._seen.get(member.nonce)
            if before is None or before.member.beats != member.beats:
                self._seen[member.nonce] = _Seen(member, now if before is None else before.first, now)
        recent = {nonce: seen for nonce, seen in self._seen.items() if now - seen.latest < SILENT_SECONDS}
        self._seen = {nonce: seen for nonce, seen in recent.items() if not seen.member.is_dead}
        return [seen.member for seen in self._seen.values()]

    def settled(self, now: float) -> set[str]:
        """Return the nonces of the ranks that have waited for `UNSURE_SECONDS`."""
        return {nonce for nonce, seen in self._seen.items() if now - seen.first > UNSURE_SECONDS}


def admit(
    members: Mapping[int, Member], candidates: Iterable[Member], world: int, settled: Collection[str] = ()
) -> dict[int, Member]:
    """Return the members of a launch of `world` ranks: the present ones, then candidates for the free ranks.

    A candidate must agree with each member about the launch. If its nonce is not among the `settled` ones, it must surely
    agree. Rank 0 is already a member.
    """
    there = list(candidates)
    present = {candidate.nonce for candidate in there}
    kept = {rank: member for rank, member in members.items() if rank == 0 or member.nonce in present}
    launches = {member.launch for member in kept.values()}  # equal ones, as on one node, are compared once
    for candidate in there:
        free = 0 < candidate.rank < world and candidate.rank not in kept
        agrees = LaunchIdentity.agrees_with if candidate.nonce in settled else LaunchIdentity.surely_agrees_with
        if free and all(agrees(candidate.launch, launch) for launch in launches):
            kept[candidate.rank] = candidate
            launches.add(candidate.launch)
    return kept


def refuse_own(registry: MemberRegistry, me: Member, world: int, run_dir: Path, code: int) -> None:
    """Ask the other ranks of a launch whose rank 0 (`me`) was refused to exit with `code`.

    Ranks in the attempt spec of the lock's holder are not of this launch. A rank that only may be of this launch is not asked
    either: it can be a replaced rank of the holder's, which the holder does not list yet.
    """
    deadline, notified = time.monotonic() + REFUSE_SECONDS, set[str]()
    while len(notified) < world - 1 and time.monotonic() < deadline:
        taken = named_by_owner(run_dir)
        for member in registry.members():
            if member.nonce in taken or not member.launch.surely_agrees_with(me.launch):
                continue
            try:
                if registry.refusal(member) is None:  # also if a new holder of the lock has removed it
                    registry.refuse(member, code)
                else:
                    notified.add(member.nonce)
            except OSError as error:
                _log.warning("rank %d could not be asked to exit: %s", member.rank, error)
        time.sleep(0.1)


def named_by_owner(run_dir: Path) -> set[str]:
    """Return the nonces of the members that the lock's holder lists."""
    owner = owner_of(run_dir)
    store = RendezvousStore.of_token(run_dir, owner.body["token"]) if owner is not None else None
    spec = store.attempt_spec() if store is not None else None
    return set(spec.members.values()) if spec is not None else set()
