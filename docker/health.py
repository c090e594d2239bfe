#!/usr/bin/python3 -IS
"""Whether the supervisors of this container's ranks are alive: HEALTHCHECK, startup and liveness probe. Exit status 0 or 1.

A supervisor looks at its rank ten times a second and sleeps in between; the kernel counts how often a process went to sleep.
That is its heartbeat: it needs no file, no port and no help from the process, and it stops when the supervisor is stopped,
dead, or stuck in a file system. Whether the rank itself gets on is the supervisor's business, not a probe's.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

WATCH_SECONDS = 5.0  # a supervisor sleeps 50 times in it
PROC = Path("/proc")


def supervisors(proc: Path = PROC) -> list[int]:
    """Process ids of all `sdit train` of this container; the ranks that they start have another command line."""
    return sorted(int(folder.name) for folder in proc.glob("[0-9]*") if _verb(folder, "sdit") == "train")


def naps(pid: int, proc: Path = PROC) -> int | None:
    """How often a process went to sleep so far; None: there is no such process."""
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches:")), None)


def trouble(proc: Path = PROC, ranks: int = 1, watch_seconds: float = WATCH_SECONDS) -> str:
    """What is wrong with the supervisors of `ranks` ranks; empty: nothing."""
    if _verb(proc / "1", "entrypoint.sh") != "train":
        return ""  # another verb: it lives as long as its container does
    before = {pid: naps(pid, proc) for pid in supervisors(proc)}
    if len(before) < ranks:
        return f"{len(before)} of {ranks} supervisors run"
    deadline = time.monotonic() + watch_seconds
    still = dict(before)
    while still and time.monotonic() < deadline:
        time.sleep(0.2)
        still = {pid: count for pid, count in still.items() if naps(pid, proc) == count}
    return "" if not still else f"supervisor {next(iter(still))} does not move"


def _verb(process: Path, program: str) -> str | None:
    """The word after `program` on a process's command line."""
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((verb for word, verb in itertools.pairwise(words) if Path(word).name == program), None)


if __name__ == "__main__":
    found = trouble(ranks=int(os.environ.get("RANKS_PER_NODE", "1")))
    if found:
        print(found)
    sys.exit(bool(found))
