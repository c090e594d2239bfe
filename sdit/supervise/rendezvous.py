"""The rendezvous store: small files in RUN/supervise that the supervisors of one launch exchange.

    waiting/00001-NONCE.json     rank 1's supervisor is present: nonce, host, pid, launch, digest of the config. It is
                                 touched while the rank waits
    waiting/00001-NONCE.refused  rank 0 of its launch was refused, so the rank must exit
    TOKEN/plan.json              from the holder of the run's lock: attempt, members, address and port; written once per attempt
    TOKEN/beat.json              from the same: the version of plan.json, and whether the attempt or the run ends. It is
                                 touched while the holder is alive
    TOKEN/end-0002/00001.json    the exit report of rank 1 in attempt 2
    TOKEN/end-0002/node-00008.json   those of all ranks of a node, whose first one is 8

The token of the lock identifies a launch. It is a new random number each time. Only the lock's holder creates the folder of its
token, and only the members of its attempt spec write there. Other ranks write only files with their own nonce. One supervisor
of each node polls one file of a few bytes, and reads plan.json when its version has changed; see `node_copy`. Only rank 0's
supervisor, and ranks that no attempt spec lists, list folders. Rank 0's supervisor reads each announcement and each file of
exit reports once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdit.files import read_json, write_json
from sdit.supervise.members import TOKEN, WAITING, Member, make_folder
from sdit.supervise.node_copy import Beat, NodeCopy
from sdit.supervise.restart_policy import ExitReport

REPORT = re.compile(r"(node-)?\d+\.json")
NODE_SECONDS = 2.0  # a rank waits this long for the exit reports of the other ranks of its node


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

    def ranks_of_host(self, rank: int) -> list[int]:
        """Return the participating ranks of a rank's host."""
        host = self.hosts[self.order.index(rank)]
        return [other for other, its_host in zip(self.order, self.hosts, strict=True) if its_host == host]


class RendezvousStore:
    """The folder RUN/supervise/TOKEN of the launch whose rank 0 holds the lock with this token.

    Methods that write raise OSError if the file system fails.
    """

    def __init__(self, run_dir: Path, token: str, copy: NodeCopy | None = None) -> None:
        """Take a run folder and a lock's token. With a `copy`, what is read here is shared with the node."""
        assert TOKEN.fullmatch(token), token
        self.token, self.copy = token, copy
        self._folder = run_dir / "supervise" / token
        self._spec, self._beat = self._folder / "plan.json", self._folder / "beat.json"
        self._written: tuple[int, AttemptSpec] | None = None  # version and content of the one that it wrote last
        self._known: tuple[int, AttemptSpec] | None = None  # version and content of the one that it read last
        # The reports that were read, by attempt and name of the file.
        self._reports: dict[int, dict[str, list[ExitReport]]] = {}
        # The attempt whose report waits for the others of the node, and since when.
        self._waits_since: tuple[int, float] | None = None

    @classmethod
    def of_token(cls, run_dir: Path, token: str) -> RendezvousStore | None:
        """Return the store of a lock's token, or None if `token` is not one."""
        return cls(run_dir, token) if TOKEN.fullmatch(token) else None

    @classmethod
    def shared(cls, run_dir: Path, token: str) -> RendezvousStore:
        """Return the store of a lock's token, with a copy of what is read for the other supervisors of the node."""
        return cls(run_dir, token, NodeCopy(token))

    @classmethod
    def all_of(cls, run_dir: Path) -> list[RendezvousStore]:
        """Return the existing stores, with their copies: that of the lock's holder, or of the last launch."""
        try:
            names = sorted(path.name for path in (run_dir / "supervise").iterdir())
        except FileNotFoundError:
            return []
        return [cls.shared(run_dir, name) for name in names if TOKEN.fullmatch(name)]

    def open(self) -> None:
        """Create the folder and remove those of earlier launches. Only the lock's holder may do so."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.parent.iterdir():
            if other not in (self._folder, self._folder.with_name(WAITING)):
                shutil.rmtree(other, ignore_errors=True)

    def publish(self, spec: AttemptSpec) -> None:
        """Write an attempt spec for all ranks."""
        make_folder(self._folder)  # a user may have deleted it during the launch
        self._reports_of(spec.attempt).mkdir(exist_ok=True)
        lasting = replace(spec, ending=False, code=None)
        version = self._written[0] if self._written is not None else 0
        if self._written is None or self._written[1] != lasting or not self._spec.exists():
            version += 1
            write_json(self._spec, {**asdict(lasting), "version": version})
            self._written = version, lasting
        write_json(self._beat, {"version": version, "ending": spec.ending, "code": spec.code})

    @property
    def has_attempt_spec(self) -> bool:
        """True if the attempt spec exists. A user may have deleted the folder."""
        return self._spec.exists() and self._beat.exists()

    def beat(self) -> None:
        """Show that rank 0's supervisor is alive. It needs no space on the disk."""
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
        return self._spec_at(self._read_beat())

    def copied_spec(self, max_age_seconds: float) -> AttemptSpec | None:
        """Return the attempt spec that a supervisor of this node has read within `max_age_seconds`, or None."""
        beat = self.copy.beat(max_age_seconds) if self.copy is not None else None
        return self._spec_at(beat)

    def _read_beat(self) -> Beat | None:
        """Read the beat, and copy it for the node."""
        body = read_json(self._beat)
        try:
            beat = None if body is None else Beat(**body, time_ns=self._beat.stat().st_mtime_ns)
        except (FileNotFoundError, TypeError):  # it was deleted, or is of another version
            return None
        if beat is not None and self.copy is not None:
            self.copy.write_beat(beat)
        return beat

    def _spec_at(self, beat: Beat | None) -> AttemptSpec | None:
        """Return the attempt spec of a beat, which is read only if its version is new."""
        if beat is None:
            return None
        if self._known is None or self._known[0] != beat.version:
            body = self._read_spec(beat.version)
            if body is None:
                return None
            version = body.pop("version", 0)
            spec = AttemptSpec(**body)
            self._known = version, replace(spec, order=tuple(spec.order), hosts=tuple(spec.hosts))
        version, spec = self._known
        if version != beat.version:  # the attempt spec is newer than the beat, which is about to follow
            return replace(spec, beats=beat.time_ns)
        return replace(spec, beats=beat.time_ns, ending=beat.ending, code=beat.code)

    def _read_spec(self, version: int) -> dict[str, Any] | None:
        """Return plan.json, from the node's copy if it has this version."""
        body = self.copy.spec(version) if self.copy is not None else None
        if body is None:
            body = read_json(self._spec)
            if body is not None and self.copy is not None:
                self.copy.write_spec(body)
        return body

    def report_exit(self, attempt: int, report: ExitReport) -> None:
        """Write the exit report of a rank unless it exists. The caller repeats this.

        Reports that can wait are written together with those of the other ranks of the node, in one file, by any of its
        supervisors. If the folder is missing, nothing is written. Either rank 0 creates it again, or a new holder of the
        lock has removed the launch.
        """
        name, body = self._own_or_node(attempt, report)
        path = self._reports_of(attempt) / name
        if body and not path.exists():
            with contextlib.suppress(FileNotFoundError):
                path.parent.mkdir(exist_ok=True)
                write_json(path, body)

    def _own_or_node(self, attempt: int, report: ExitReport) -> tuple[str, dict[str, Any]]:
        """Return name and content of the file to write for an exit report. There is no content while it waits for others.

        A report that ends the attempt is written at once.
        """
        own = f"{report.rank:05d}.json", asdict(report)
        spec = self._known[1] if self._known is not None else None
        if self.copy is None or spec is None or spec.attempt != attempt or report.rank not in spec.order:
            return own
        ranks = spec.ranks_of_host(report.rank)
        if len(ranks) == 1:
            return own
        self.copy.write_report(attempt, report.rank, own[1])
        if not report.is_clean and report.cause != "peer":
            return own
        reports = self.copy.reports(attempt, ranks)
        if len(reports) == len(ranks):
            return f"node-{ranks[0]:05d}.json", {"reports": reports}
        if self._waits_since is None or self._waits_since[0] != attempt:
            self._waits_since = attempt, time.monotonic()
        return own if time.monotonic() - self._waits_since[1] > NODE_SECONDS else (own[0], {})

    def exit_reports(self, attempt: int) -> dict[int, ExitReport]:
        """Return the exit reports of an attempt by rank. Each file is read once."""
        folder, known = self._reports_of(attempt), self._reports.setdefault(attempt, {})
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            names = []
        for name in names:
            body = read_json(folder / name) if REPORT.fullmatch(name) and name not in known else None
            if body is not None:
                known[name] = [ExitReport(**each) for each in body.get("reports", [body])]
        return {report.rank: report for reports in known.values() for report in reports}

    def _reports_of(self, attempt: int) -> Path:
        return self._folder / f"end-{attempt:04d}"
