"""Launchers of fake ranks that look like real ones: scripts whose names are those of `deepspeed` and its helper."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.distributed.harness import ROOT, rank_environments
from tests.faults.ranks import FAKE, eventually

# As deepspeed.launcher.launch: starts the ranks, and ends the others when one fails.
INNER = """
import json, subprocess, sys, time
ranks = [subprocess.Popen(json.loads(sys.argv[1]), env=environment) for environment in json.loads(sys.argv[2])]
print(*[rank.pid for rank in ranks], flush=True)
while True:
    codes = [rank.poll() for rank in ranks]
    if any(codes) or None not in codes:
        break
    time.sleep(0.2)
for rank in ranks:
    if rank.poll() is None:
        rank.terminate()
sys.exit(max(rank.wait() for rank in ranks))
"""
# As deepspeed itself: starts the helper and waits for it.
OUTER = """
import subprocess, sys
helper = subprocess.Popen([sys.executable, *sys.argv[1:]])
helper.wait()
sys.exit(max(helper.returncode, 0))
"""


class Launch:
    """`deepspeed` -> helper -> supervisors of fake ranks; processes that it started are ended with the block."""

    def __init__(
        self, run_dir: Path, environments: list[dict[str, str]], steps: int, *before: str, inner: str = "torchrun",
        outer: str = "deepspeed", **options: object,
    ) -> None:  # fmt: skip
        folder = run_dir.with_suffix(".launcher")
        folder.mkdir(exist_ok=True)
        run_dir.mkdir(exist_ok=True)
        (folder / outer).write_text(OUTER)
        (folder / inner).write_text(INNER)
        rank = [sys.executable, str(FAKE), str(run_dir), str(steps), json.dumps(options)]
        helper = [str(folder / inner), json.dumps(rank), json.dumps(environments)]
        self.log = folder / f"{len(list(folder.iterdir()))}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, str(folder / outer), *helper],
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Launch:
        assert self.process.stdout is not None
        self.ranks = [int(word) for word in self.process.stdout.readline().split()]
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.ranks, self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()

    def helper(self) -> int:
        """Process id of the second process, the parent of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(eventually(lambda: children.read_text().split())[0])

    @property
    def output(self) -> str:
        return self.log.read_text()


def environments(world: int) -> list[dict[str, str]]:
    """What every launch of `world` ranks on the default port gives its ranks."""
    return rank_environments(world)
