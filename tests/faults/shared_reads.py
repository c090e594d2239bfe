"""A fake rank on one of several virtual nodes. It logs each read of the beat in the shared folder, and can be struck in one.

usage: as fake_rank.py, with these options in "reads":
    {"folder": DIR, "ranks_per_node": n, "node": k, "strike": SIGNAL or null}

A line of DIR/node-K.reads has the rank that read and the time. Each node has a memory of its own, DIR/node-K. When the
run has a checkpoint, the supervisor of node `k` that reads next gets `strike` while it reads.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdit.supervise import node_copy, rendezvous
from tests.faults.fake_rank import main


def count_reads(options: dict[str, Any], rank: int) -> None:
    """Log the reads of this process, and strike it."""
    folder, node = Path(options["folder"]), rank // options["ranks_per_node"]
    memory, log = folder / f"node-{node}", folder / f"node-{node}.reads"
    memory.mkdir(exist_ok=True)
    read: Callable[[Path], dict[str, Any] | None] = rendezvous.read_json

    def counted(path: Path) -> dict[str, Any] | None:
        if path.name == "beat.json":
            with log.open("a") as file:
                file.write(f"{rank} {time.monotonic()}\n")
            trains = any((Path(sys.argv[1]) / "checkpoints").glob("images-*"))
            if options["strike"] is not None and node == options["node"] and trains:
                strike(folder / "struck", rank, options["strike"])
        return read(path)

    rendezvous.read_json = counted  # type: ignore[attr-defined]
    node_copy.shared_folder = lambda: memory  # type: ignore[attr-defined]


def strike(once: Path, rank: int, number: int) -> None:
    """Send a signal to this process, unless one was struck already."""
    temporary = once.with_name(f".struck-{rank}")
    temporary.write_text(str(rank))
    try:
        os.link(temporary, once)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.Signals(number))


if __name__ == "__main__":
    count_reads(json.loads(sys.argv[3])["reads"], int(os.environ["RANK"]))
    sys.exit(main())
