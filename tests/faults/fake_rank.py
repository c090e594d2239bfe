"""A rank without torch: steps, barriers, checkpoints and faults as a real one has them, but quick to start.

usage, once per rank: fake_rank.py RUN_DIR STEPS {"config": {...}, "faults": [...], "step_seconds": s, "digests": {...}}

`lost_seconds` takes the place of LOST_SECONDS, which a shared file system needs and a local folder does not.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from sdit.config import SuperviseConfig
from sdit.errors import ExitCode, SditError
from sdit.launch_environment import find_rank
from sdit.supervise import coordinator, supervisor
from sdit.supervise.heartbeat import Phase
from sdit.supervise.job import Job
from sdit.supervise.start import supervise
from sdit.supervise.worker import WorkerContext

CHECKPOINT_STEPS = 4


def train(run_dir: Path, steps: int, options: dict, rank: WorkerContext) -> int:
    """Barrier by barrier to the end; rank 0 writes empty checkpoints."""
    me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    checkpoints = run_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    done = max((int(path.name.removeprefix("images-")) for path in checkpoints.iterdir()), default=0)
    barrier = run_dir / "barriers" / f"{rank.attempt}-{os.environ['MASTER_PORT']}"
    barrier.mkdir(parents=True, exist_ok=True)
    for step in range(done, steps):
        rank.heartbeat.enter(Phase.STEP if step > done else Phase.FIRST_STEP, step)
        strike(options.get("faults", []), me, step, rank)
        time.sleep(options.get("step_seconds", 0.01))
        rank.heartbeat.progress()
        stop = meet(barrier, step, me, world, rank.heartbeat.stop_requested)
        if me == 0 and ((step + 1) % CHECKPOINT_STEPS == 0 or stop):
            (checkpoints / f"images-{step + 1:012d}").mkdir()
        if stop:
            return ExitCode.REQUEUE
    return ExitCode.DONE


def meet(barrier: Path, step: int, me: int, world: int, stop: bool) -> bool:
    """Wait for all ranks, as a collective does: for ever. Whether anybody wants to stop."""
    temporary = barrier / f".{me}"
    temporary.write_text("stop" if stop else "go")
    temporary.rename(barrier / f"{step}-{me}")
    papers = [barrier / f"{step}-{rank}" for rank in range(world)]
    while not all(paper.exists() for paper in papers):
        time.sleep(0.005)
    return any(paper.read_text() == "stop" for paper in papers)


def strike(faults: list[str], me: int, step: int, rank: WorkerContext) -> None:
    for fault in faults:
        kind, _, where = fault.partition("@")
        if where.rstrip("!") != f"{me}:{step}" or (rank.attempt > 1 and not where.endswith("!")):
            continue
        Path(sys.argv[1], "struck").touch()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            while True:  # a request for its stacks wakes it
                os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "gil":
            while True:
                ctypes.PyDLL(None).sleep(600)
        elif kind == "hang":
            time.sleep(600)
        elif kind == "exception":
            rank.heartbeat.fail("RuntimeError: injected", secondary=False)
            os._exit(ExitCode.CRASH)
        else:
            os._exit(int(kind))


def main() -> int:
    rank = WorkerContext.from_environment(os.environ)
    run_dir, steps, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    if rank.is_supervised:
        return train(run_dir, steps, options, rank)
    config = SuperviseConfig(**options.get("config", {}))
    digest = options.get("digests", {}).get(os.environ["RANK"], "same")
    coordinator.LOST_SECONDS = supervisor.LOST_SECONDS = options.get("lost_seconds", coordinator.LOST_SECONDS)
    job = Job([sys.executable, *sys.orig_argv[1:]], run_dir, digest, lambda ranks: ranks)
    try:
        return supervise(job, config, find_rank(os.environ), os.environ)
    except SditError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
