"""Small files in RUN/supervise by which the supervisors of one launch agree.

    waiting/00001-NONCE.json     rank 1's supervisor is here: nonce, host, pid, launch, digest of the config
    waiting/00001-NONCE.refused  its own launch's rank 0 was refused: leave
    TOKEN/plan.json              the holder of the run's lock, by the lock's token: attempt, members, meeting point, exit code
    TOKEN/end-0002-00001.json    how rank 1's part of attempt 2 ended

A launch is known by the token of its lock, which is a new random number each time. Only the lock's holder creates the folder of
its token, and only the ranks that its plan names write there. A rank that no plan names writes files with its own nonce only.
Everyone polls one file; only rank 0's supervisor, and ranks that no plan names, list folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdit.json_files import read_json, write_json
from sdit.supervise.launch import LaunchMark
from sdit.supervise.process import is_running, machine
from sdit.supervise.verdict import End

WAITING = "waiting"
TOKEN = re.compile(r"[0-9a-f]{32}")
NOWHERE = LaunchMark("", "", "", "")


@dataclass(frozen=True)
class Note:
    """A supervisor's presence; `beats` grows while it waits to be named by a plan."""

    rank: int
    nonce: str
    host: str
    pid: int
    digest: str
    started: str | None = None
    machine: str = ""
    launch: LaunchMark = NOWHERE
    beats: int = 0

    @classmethod
    def parse(cls, body: dict[str, Any] | None) -> Note | None:
        """Return the note in a file; None if it is of another version or damaged."""
        try:
            note = cls(**{**(body or {}), "launch": LaunchMark(**(body or {})["launch"])})
        except (KeyError, TypeError):
            return None
        sound = isinstance(note.rank, int) and isinstance(note.pid, int) and TOKEN.fullmatch(str(note.nonce))
        return note if sound else None

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone, which is known on its own machine only."""
        return self.machine == machine() and not is_running(self.pid, self.started)


@dataclass(frozen=True)
class Plan:
    """What rank 0's supervisor wants of all: to run attempt `attempt`, to end it (`ending`), or to leave with `code`.

    `order` lists the launch ranks that take part, in the order of their ranks in this attempt; `beats` grows while the
    supervisor lives. Attempt 0 names the ranks that have come so far.
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


class Waiting:
    """The folder RUN/supervise/waiting, where ranks say that they are here."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "supervise" / WAITING

    def open(self) -> None:
        """Create the folder, in a run directory that may be new. Raises: OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        """Forget who is here: ranks that wait say it again. Only the lock's holder may do so. Raises: OSError."""
        self.open()
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def post(self, note: Note) -> None:
        """Say that a rank is here. In vain if the folder is wiped at this instant, or the run is gone. Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            _make(self._folder)
            write_json(self._path(note, "json"), asdict(note))

    def holds(self, note: Note) -> bool:
        """Return whether the folder says that a rank is here."""
        return self._path(note, "json").exists()

    def notes(self) -> list[Note]:
        """Return the ranks that are here, of whatever launch."""
        found = (Note.parse(read_json(path)) for path in sorted(self._folder.glob("*.json")))
        return [note for note in found if note is not None and not note.is_dead]

    def refuse(self, note: Note, code: int) -> None:
        """Tell a rank of the own launch to leave. In vain if the folder is wiped at this instant, or gone. Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            write_json(self._path(note, "refused"), {"code": code})

    def refusal(self, note: Note) -> int | None:
        """Return the exit code that the own launch's rank 0 left for a rank; None if it left none."""
        code = (read_json(self._path(note, "refused")) or {}).get("code")
        return code if isinstance(code, int) else None

    def withdraw(self, note: Note) -> None:
        """Remove what there is of a rank."""
        for ending in ("json", "refused"):
            with contextlib.suppress(OSError):
                self._path(note, ending).unlink()

    def _path(self, note: Note, ending: str) -> Path:
        return self._folder / f"{note.rank:05d}-{note.nonce}.{ending}"


class Board:
    """The folder RUN/supervise/TOKEN of the launch whose rank 0 holds the lock with this token."""

    def __init__(self, run_dir: Path, token: str) -> None:
        assert TOKEN.fullmatch(token), token
        self._folder = run_dir / "supervise" / token
        self._plan = self._folder / "plan.json"

    @classmethod
    def of_token(cls, run_dir: Path, token: str) -> Board | None:
        """Return the board that a lock's token names; None for anything that is no token."""
        return cls(run_dir, token) if TOKEN.fullmatch(token) else None

    @classmethod
    def all_of(cls, run_dir: Path) -> list[Board]:
        """Return the boards that there are: that of the lock's holder, or of the launch that ended last."""
        try:
            names = sorted(path.name for path in (run_dir / "supervise").iterdir())
        except FileNotFoundError:
            return []
        return [cls(run_dir, name) for name in names if TOKEN.fullmatch(name)]

    def open(self) -> None:
        """Create the folder and remove those of earlier launches. Only the lock's holder may do so. Raises: OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.parent.iterdir():
            if other not in (self._folder, self._folder.with_name(WAITING)):
                shutil.rmtree(other, ignore_errors=True)

    def post_plan(self, plan: Plan) -> Plan:
        _make(self._folder)  # somebody may have removed it under a running launch
        write_json(self._plan, asdict(plan))
        return plan

    @property
    def has_plan(self) -> bool:
        """Return whether the plan is there: somebody may have removed the folder."""
        return self._plan.exists()

    def beat(self) -> None:
        """Show that rank 0's supervisor lives although the plan cannot be written: the disk is full. Raises: OSError."""
        os.utime(self._plan)

    def problem(self, note: Note) -> str:
        """Return why nothing can be written here, such as `Read-only file system`; empty if it can, or the folder is gone."""
        try:
            write_json(self._folder / f".writable-{note.rank:05d}.json", asdict(note))
        except FileNotFoundError:
            return ""
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
        """Say how a rank's attempt ended, if the folder does not say so yet.

        If the folder is missing, nothing is written: rank 0 creates it again, or a new holder of the lock has removed the launch.
        The caller calls again at each look. Raises: OSError.
        """
        path = self._folder / f"end-{attempt:04d}-{end.rank:05d}.json"
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                write_json(path, asdict(end))

    def ends(self, attempt: int) -> dict[int, End]:
        """How the ranks of an attempt ended, of those that have."""
        found = (read_json(path) for path in self._folder.glob(f"end-{attempt:04d}-*.json"))
        return {body["rank"]: End(**body) for body in found if body is not None}


def _make(folder: Path) -> None:
    """Create RUN/supervise and a folder in it, but never RUN itself. Raises: OSError."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
