"""The ranks of a launch that wait for its first attempt: each announces itself in RUN/supervise/waiting."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdit.files import read_json, write_json
from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.process import is_running, machine, start_ticks

WAITING = "waiting"
TOKEN = re.compile(r"[0-9a-f]{32}")
NOWHERE = LaunchIdentity("", "", "", "")


@dataclass(frozen=True)
class Member:
    """A supervisor that is present. `beats`, the time of its file, increases while it waits for the first attempt."""

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
    def of_this_process(cls, rank: int, digest: str, environment: Mapping[str, str]) -> Member:
        """Return this process as the supervisor of a rank, whose config has this digest."""
        pid, launch = os.getpid(), LaunchIdentity.of_this_process(environment)
        return cls(rank, uuid.uuid4().hex, socket.gethostname(), pid, digest, start_ticks(pid), machine(), launch)

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


class MemberRegistry:
    """The folder RUN/supervise/waiting, in which ranks announce themselves.

    Methods that write raise OSError if the file system fails.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "supervise" / WAITING
        # Inode and content of the announcements, by the name of the file.
        self._known: dict[str, tuple[int, Member]] = {}

    def open(self) -> None:
        """Create the folder, in a run directory that may be new."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def wipe(self) -> None:
        """Remove all entries. Waiting ranks announce themselves again. Only the lock's holder may call it."""
        self.open()
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def post(self, member: Member) -> None:
        """Announce a rank. It has no effect if the folder is wiped at the same time or the run is deleted."""
        with contextlib.suppress(FileNotFoundError):
            make_folder(self._folder)
            write_json(self._path(member, "json"), asdict(member))

    def touch(self, member: Member) -> bool:
        """Show that an announced rank still waits. Return False if it is not announced, because the folder was wiped."""
        try:
            os.utime(self._path(member, "json"))
        except FileNotFoundError:
            return False
        return True

    def holds(self, member: Member) -> bool:
        """Return True if the rank is announced."""
        return self._path(member, "json").exists()

    def members(self) -> list[Member]:
        """Return the announced ranks of all launches. Each file is read once, and then only its time is checked."""
        try:
            with os.scandir(self._folder) as entries:
                found = [self._member(entry) for entry in entries if entry.name.endswith(".json")]
        except FileNotFoundError:
            found = []
        there = {name: (inode, member) for name, inode, member in found if member is not None}
        self._known = there
        return [member for _, (_, member) in sorted(there.items()) if not member.is_dead]

    def _member(self, entry: os.DirEntry[str]) -> tuple[str, int, Member | None]:
        """Return the name of an announcement, its inode, and its content, or None if it is damaged or gone."""
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return entry.name, 0, None
        known = self._known.get(entry.name)
        is_known = known is not None and known[0] == status.st_ino
        member = known[1] if known is not None and is_known else Member.parse(read_json(Path(entry.path)))
        return entry.name, status.st_ino, member and replace(member, beats=status.st_mtime_ns)

    def refuse(self, member: Member, code: int) -> None:
        """Ask a rank of the same launch to exit. It has no effect if the folder is being wiped or is deleted."""
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


def make_folder(folder: Path) -> None:
    """Create RUN/supervise and a folder in it, but never RUN itself. Raises: OSError."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
