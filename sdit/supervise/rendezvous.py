"""The rendezvous store: small files in RUN/supervise that the supervisors of one launch exchange.

    waiting/00001-NONCE.json     rank 1's supervisor is present: nonce, host, pid, launch, digest of the config
    waiting/00001-NONCE.refused  rank 0 of its launch was refused, so the rank must exit
    TOKEN/plan.json              from the holder of the run's lock: attempt, members, address and port, exit code
    TOKEN/beat.json              from the same: the version of plan.json. It is rewritten while the holder is alive
    TOKEN/end-0002-00001.json    the exit report of rank 1 in attempt 2

The token of the lock identifies a launch. It is a new random number each time. Only the lock's holder creates the folder of its
token, and only the members of its attempt spec write there. Other ranks write only files with their own nonce. Each supervisor
polls one file of a few bytes, and reads plan.json when its version has changed. Only rank 0's supervisor, and ranks that no
attempt spec lists, list folders.
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
from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.process import is_running, machine
from sdit.supervise.restart_policy import ExitReport

WAITING = "waiting"
TOKEN = re.compile(r"[0-9a-f]{32}")
NOWHERE = LaunchIdentity("", "", "", "")


@dataclass(frozen=True)
class Member:
    """A supervisor that is present. `beats` increases while it waits until an attempt spec lists it."""

    rank: int
    nonce: str
    host: str
    pid: int
    digest: str
    started: str | None = None
    machine: str = ""
    launch: LaunchIdentity = NOWHERE
    beats: int = 0

    @classmethod
    def parse(cls, body: dict[str, Any] | None) -> Member | None:
        """Return the member in a file, or None if the file is damaged or of another version."""
        try:
            member = cls(**{**(body or {}), "launch": LaunchIdentity(**(body or {})["launch"])})
        except (KeyError, TypeError):
            return None
        sound = isinstance(member.rank, int) and isinstance(member.pid, int) and TOKEN.fullmatch(str(member.nonce))
        return member if sound else None

    @property
    def is_dead(self) -> bool:
        """True if its process has ended. Other machines cannot know, so it is False there."""
        return self.machine == machine() and not is_running(self.pid, self.started)


@dataclass(frozen=True)
class AttemptSpec:
    """An instruction of rank 0's supervisor to all: run attempt `attempt`, end it (`ending`), or exit with `code`.

    `order` lists the participating launch ranks, in the order of their ranks in this attempt. `beats` increases while the
    supervisor is alive. Attempt 0 lists the ranks that are present so far.
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


class MemberRegistry:
    """The folder RUN/supervise/waiting, in which ranks announce themselves."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "supervise" / WAITING

    def open(self) -> None:
        """Create the folder, in a run directory that may be new.

        Raises: OSError: if it cannot be created.
        """
        self._folder.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        """Remove all entries. Waiting ranks announce themselves again. Only the lock's holder may call it.

        Raises: OSError: if the file system fails.
        """
        self.open()
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def post(self, member: Member) -> None:
        """Announce a rank. It has no effect if the folder is wiped at the same time or the run is deleted.

        Raises: OSError: if the file system fails.
        """
        with contextlib.suppress(FileNotFoundError):
            _make(self._folder)
            write_json(self._path(member, "json"), asdict(member))

    def holds(self, member: Member) -> bool:
        """Return True if the rank is announced."""
        return self._path(member, "json").exists()

    def members(self) -> list[Member]:
        """Return the announced ranks of all launches."""
        found = (Member.parse(read_json(path)) for path in sorted(self._folder.glob("*.json")))
        return [member for member in found if member is not None and not member.is_dead]

    def refuse(self, member: Member, code: int) -> None:
        """Ask a rank of the same launch to exit. It has no effect if the folder is being wiped or is deleted.

        Raises: OSError: if the file system fails.
        """
        with contextlib.suppress(FileNotFoundError):
            write_json(self._path(member, "refused"), {"code": code})

    def refusal(self, member: Member) -> int | None:
        """Return the exit code that rank 0 of the same launch wrote for a rank, or None if there is none."""
        code = (read_json(self._path(member, "refused")) or {}).get("code")
        return code if isinstance(code, int) else None

    def withdraw(self, member: Member) -> None:
        """Remove the files of a rank."""
        for ending in ("json", "refused"):
            with contextlib.suppress(OSError):
                self._path(member, ending).unlink()

    def _path(self, member: Member, ending: str) -> Path:
        return self._folder / f"{member.rank:05d}-{member.nonce}.{ending}"


class RendezvousStore:
    """The folder RUN/supervise/TOKEN of the launch whose rank 0 holds the lock with this token."""

    def __init__(self, run_dir: Path, token: str) -> None:
        assert TOKEN.fullmatch(token), token
        self._folder = run_dir / "supervise" / token
        self._spec, self._beat = self._folder / "plan.json", self._folder / "beat.json"
        self._version = 0  # of the attempt spec that this process wrote last
        self._known: tuple[int, AttemptSpec] | None = None  # version and content of the one that it read last

    @classmethod
    def of_token(cls, run_dir: Path, token: str) -> RendezvousStore | None:
        """Return the store of a lock's token, or None if `token` is not one."""
        return cls(run_dir, token) if TOKEN.fullmatch(token) else None

    @classmethod
    def all_of(cls, run_dir: Path) -> list[RendezvousStore]:
        """Return the existing stores: that of the lock's holder, or of the last launch."""
        try:
            names = sorted(path.name for path in (run_dir / "supervise").iterdir())
        except FileNotFoundError:
            return []
        return [cls(run_dir, name) for name in names if TOKEN.fullmatch(name)]

    def open(self) -> None:
        """Create the folder and remove those of earlier launches. Only the lock's holder may do so.

        Raises: OSError: if it cannot be created.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.parent.iterdir():
            if other not in (self._folder, self._folder.with_name(WAITING)):
                shutil.rmtree(other, ignore_errors=True)

    def publish(self, spec: AttemptSpec) -> AttemptSpec:
        """Write an attempt spec for all ranks.

        Raises: OSError: if the file system fails.
        """
        _make(self._folder)  # a user may have deleted it during the launch
        self._version += 1
        write_json(self._spec, {**asdict(spec), "version": self._version})
        write_json(self._beat, {"version": self._version})
        return spec

    @property
    def has_attempt_spec(self) -> bool:
        """True if the attempt spec exists. A user may have deleted the folder."""
        return self._spec.exists() and self._beat.exists()

    def beat(self) -> None:
        """Show that rank 0's supervisor is alive. It needs no space on the disk.

        Raises: OSError: if the file system fails.
        """
        os.utime(self._beat)

    def problem(self, member: Member) -> str:
        """Return the reason why nothing can be written here, such as `Read-only file system`.

        It is empty if writing works or the folder is deleted.
        """
        try:
            write_json(self._folder / f".writable-{member.rank:05d}.json", asdict(member))
        except FileNotFoundError:
            return ""
        except OSError as error:
            return str(error.strerror)
        return ""

    def attempt_spec(self) -> AttemptSpec | None:
        """Return the attempt spec, or None if there is none. `beats` is the time of the beat."""
        beat = read_json(self._beat)
        if beat is None:
            return None
        if self._known is None or self._known[0] != beat.get("version"):
            body = read_json(self._spec)
            if body is None:
                return None
            version = body.pop("version", 0)
            spec = AttemptSpec(**body)
            self._known = version, replace(spec, order=tuple(spec.order), hosts=tuple(spec.hosts))
        try:
            return replace(self._known[1], beats=self._beat.stat().st_mtime_ns)
        except FileNotFoundError:
            return None

    def report_exit(self, attempt: int, report: ExitReport) -> None:
        """Write the exit report of a rank unless it exists. The caller repeats this at each poll.

        If the folder is missing, nothing is written. Either rank 0 creates it again, or a new holder of the lock has removed
        the launch.

        Raises: OSError: if the file system fails.
        """
        path = self._folder / f"end-{attempt:04d}-{report.rank:05d}.json"
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                write_json(path, asdict(report))

    def exit_reports(self, attempt: int) -> dict[int, ExitReport]:
        """Return the exit reports of an attempt by rank."""
        found = (read_json(path) for path in self._folder.glob(f"end-{attempt:04d}-*.json"))
        return {body["rank"]: ExitReport(**body) for body in found if body is not None}


def _make(folder: Path) -> None:
    """Create RUN/supervise and a folder in it, but never RUN itself.

    Raises: OSError: if the file system fails.
    """
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
