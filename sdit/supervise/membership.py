"""Finds the attempt spec of a supervisor's launch, or learns that the launch was refused."""

from __future__ import annotations

import logging
import math
import time

from sdit.errors import ExitCode
from sdit.supervise.admission import SILENT_SECONDS
from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.lock import Holder, in_use, owner_of
from sdit.supervise.members import Member, MemberRegistry
from sdit.supervise.rendezvous import AttemptSpec, RendezvousStore
from sdit.supervise.restart_policy import ExitReport
from sdit.supervise.run_folder import RunFolder

HEARTBEAT_SECONDS = 2.0
ANNOUNCEMENTS_PER_SECOND = 500  # of all ranks together, at most
# During this time the lock's holder lists its ranks, even one that another launch refused by mistake.
DOUBT_SECONDS = 2.0
FOREIGN_SECONDS = 30.0  # if another launch holds the lock for longer, rank 0 of this launch was refused
_log = logging.getLogger(__name__)


class Membership:
    """Connects a supervisor to its launch.

    Rank 0's supervisor has the `store`. Other supervisors announce themselves until the first attempt begins.
    """

    def __init__(
        self, folder: RunFolder, member: Member, world: int, registry: MemberRegistry,
        store: RendezvousStore | None = None,
    ) -> None:  # fmt: skip
        self._shown, self._world, run_dir = folder.path, world, folder.anchor
        self._run_dir, self._member, self._registry, self._store = run_dir, member, registry, store
        self._announced_at = -math.inf
        self._refused_since: float | None = None
        self._foreign: tuple[Holder, float] | None = None

    def copied_spec(self, max_age_seconds: float) -> AttemptSpec | None:
        """Return the attempt spec that lists this rank, if a supervisor of this node has read it within `max_age_seconds`."""
        spec = None if self._store is None else self._store.copied_spec(max_age_seconds)
        return spec if self._lists_me(spec) else None

    @property
    def shares_reads(self) -> bool:
        """True if what this process reads is copied for the node."""
        return self._store is not None and self._store.copy is not None and self._store.copy.is_written

    def discard_copy(self) -> None:
        """Let each supervisor of this node read the shared store at its next poll."""
        if self._store is not None and self._store.copy is not None:
            self._store.copy.discard()

    def attempt_spec(self) -> AttemptSpec | None:
        """Return the attempt spec that lists this rank, or None if there is none yet.

        Raises: OSError: if the file system fails.
        """
        spec = self._named_by(self._store)
        if spec is None:  # also if a new holder of the lock has removed the store
            found = ((store, self._named_by(store)) for store in RendezvousStore.all_of(self._run_dir))
            self._store, spec = next(((store, spec) for store, spec in found if spec is not None), (self._store, None))
        if spec is None or spec.attempt == 0:
            self._announce()
        if spec is not None:
            self._refused_since = self._foreign = None
        return spec

    def _named_by(self, store: RendezvousStore | None) -> AttemptSpec | None:
        """Return the store's attempt spec if it lists this rank."""
        spec = None if store is None else store.attempt_spec()
        return spec if self._lists_me(spec) else None

    def _lists_me(self, spec: AttemptSpec | None) -> bool:
        return spec is not None and spec.names(self._member.rank, self._member.nonce)

    def report_exit(self, attempt: int, report: ExitReport) -> None:
        """Report the end of this rank's attempt. Raises: OSError: if it cannot be written."""
        if self._store is not None:
            self._store.report_exit(attempt, report)

    def problem(self) -> str:
        """Return the reason why this rank cannot write to the folder of its launch, or an empty string."""
        return "" if self._store is None else self._store.problem(self._member)

    def refusal(self) -> tuple[int, str] | None:
        """Return exit code and message if the launch of this rank was refused, or None if the rank must wait.

        The message is empty if rank 0 prints it.
        """
        now = time.monotonic()
        code = self._registry.refusal(self._member)
        if code is not None:
            self._refused_since = self._refused_since or now
            if now - self._refused_since > DOUBT_SECONDS:
                return code, ""
        owner = owner_of(self._run_dir)
        if owner is None or _mark(owner).surely_agrees_with(self._member.launch):
            self._foreign = None
        elif self._foreign is None or self._foreign[0].body["token"] != owner.body["token"]:
            self._foreign = owner, now
        elif owner.stamp != self._foreign[0].stamp and now - self._foreign[1] > FOREIGN_SECONDS:
            return ExitCode.CONFIG, str(in_use(self._shown, owner))
        return None

    def _announce(self) -> None:
        """Announce this rank repeatedly, because the next holder of the lock removes earlier announcements."""
        if self._member.rank == 0:
            return
        now = time.monotonic()
        is_due = now - self._announced_at > announce_seconds(self._world)
        if self._registry.touch(self._member) if is_due else self._registry.holds(self._member):
            self._announced_at = now if is_due else self._announced_at
            return
        self._announced_at = now
        self._registry.post(self._member)


def announce_seconds(world: int) -> float:
    """Return the seconds between two announcements of a rank of `world` ranks, which are less than `SILENT_SECONDS`."""
    return min(max(HEARTBEAT_SECONDS, world / ANNOUNCEMENTS_PER_SECOND), SILENT_SECONDS / 3)


def _mark(owner: Holder) -> LaunchIdentity:
    try:
        return LaunchIdentity(**owner.body["launch"])
    except (KeyError, TypeError):  # a lock of another version
        return LaunchIdentity("another version", "", "", "")
