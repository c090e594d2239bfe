"""The notice board of one launch, a folder in the run directory: ranks post notes, rank 0's supervisor posts the plan.

    rank-00001.json         here I am: nonce, host, pid, digest of the config
    end-0002-00001.json     how rank 1's part of attempt 2 ended
    plan.json               rank 0's supervisor: attempt, members, meeting point; at last, the exit code for all

A plan holds for a rank when it names the rank's nonce, so that files of an earlier launch mean nothing. Everyone polls
one file; only rank 0's supervisor lists the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sdit.supervise.files import read_json, write_json
from sdit.supervise.verdict import End


@dataclass(frozen=True)
class Note:
    """A supervisor's presence."""

    rank: int
    nonce: str
    host: str
    pid: int
    digest: str


@dataclass(frozen=True)
class Plan:
    """What rank 0's supervisor wants of all: to run attempt `attempt`, to end it (`ending`), or to leave with `code`.

    `order` lists the launch ranks that take part, in the order of their ranks in this attempt; `beats` grows while the
    supervisor lives.
    """

    attempt: int
    members: dict[str, str] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    address: str = ""
    port: int = 0
    resume: str | None = None
    ending: bool = False
    code: int | None = None
    beats: int = 0

    def names(self, rank: int, nonce: str) -> bool:
        return self.members.get(str(rank)) == nonce


class Board:
    """The folder RUN/supervise/LAUNCH."""

    def __init__(self, run_dir: Path, launch: str) -> None:
        self._folder = run_dir / "supervise" / launch
        self._plan = self._folder / "plan.json"
        self._folder.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        """Rank 0's supervisor, holder of the run's lock: forget earlier launches. New notes are posted again."""
        for other in self._folder.parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def post_note(self, note: Note) -> None:
        """Say that a rank is here, unless the board says so already."""
        path = self._folder / f"rank-{note.rank:05d}.json"
        body = read_json(path)
        if body is None or body.get("nonce") != note.nonce:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(note))

    def notes(self, world: int) -> dict[int, Note]:
        """The ranks that are here."""
        found = ((rank, read_json(self._folder / f"rank-{rank:05d}.json")) for rank in range(world))
        return {rank: Note(**body) for rank, body in found if body is not None}

    def post_plan(self, plan: Plan) -> Plan:
        write_json(self._plan, asdict(plan))
        return plan

    def beat(self) -> None:
        """Show that rank 0's supervisor lives although the plan cannot be written: the disk is full. Raises: OSError."""
        os.utime(self._plan)

    def problem(self, note: Note) -> str:
        """Return why nothing can be written here, such as `Read-only file system`; empty if it can."""
        try:
            write_json(self._folder / f"rank-{note.rank:05d}.json", asdict(note))
        except OSError as error:
            return str(error.strerror)
        return ""

    def plan(self) -> Plan | None:
        """Return the plan. Its `beats` is the file's time, which `beat` changes as well; no clock is compared with it."""
        body = read_json(self._plan)
        if body is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            body["beats"] = self._plan.stat().st_mtime_ns
        return replace(Plan(**body), order=tuple(body["order"]), hosts=tuple(body["hosts"]))

    def post_end(self, attempt: int, end: End) -> None:
        write_json(self._folder / f"end-{attempt:04d}-{end.rank:05d}.json", asdict(end))

    def ends(self, attempt: int) -> dict[int, End]:
        """How the ranks of an attempt ended, of those that have."""
        found = (read_json(path) for path in self._folder.glob(f"end-{attempt:04d}-*.json"))
        return {body["rank"]: End(**body) for body in found if body is not None}
