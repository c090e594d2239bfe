"""The supervisors of W virtual ranks: they start, watch workers that only count, survive a fault and stop.

All supervisors run in this process, one after the other, on one virtual clock. They are those of `sdit train`. Only the worker
processes are replaced. The nodes have a folder each in place of their shared memory.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from scale_phases.counting import CountedFolder, VirtualClock
from scale_phases.table import Phase
from sdit.config import SuperviseConfig
from sdit.errors import ExitCode
from sdit.launch_environment import RankInfo
from sdit.supervise.heartbeat import Heartbeat
from sdit.supervise.heartbeat import Phase as WorkerPhase
from sdit.supervise.job import Job, SupervisedRank
from sdit.supervise.launch import LaunchIdentity
from sdit.supervise.members import Member
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.start import supervisor_of
from sdit.supervise.supervisor import Supervisor
from sdit.supervise.worker import STACK_SIGNAL, WorkerProcess, WorkerSpec

RANKS_PER_NODE = 8
TICK_SECONDS = 0.5
LONGEST_TICKS = 1000  # a phase that needs more has failed
NO_PROCESS = 1 << 23  # beyond the kernel's process ids
STACKS = b'Thread 0x1 (most recent call first):\n  File "train.py", line 1 in step\n'


class VirtualProcess:
    """A worker process that does not exist. It ends when it is killed or when the simulation sets `code`."""

    def __init__(self, rank: int, stacks: int) -> None:
        self.pid, self._stacks = NO_PROCESS + rank, stacks
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self.code

    def send_signal(self, sig: int) -> None:
        if sig == signal.SIGKILL:
            self.code = -signal.SIGKILL
        elif sig == STACK_SIGNAL:
            os.write(self._stacks, STACKS)


class VirtualLaunch:
    """W supervisors of one launch, and their workers."""

    def __init__(self, world: int, folder: CountedFolder, clock: VirtualClock, root: Path) -> None:
        self._world, self._folder, self._clock, self._root = world, folder, clock, root
        self._stack = ExitStack()
        self._supervisors: dict[int, Supervisor] = {}
        self._managers: dict[int, ExitStack] = {}  # of the supervisors
        self._workers: dict[int, tuple[int, VirtualProcess, Heartbeat]] = {}  # attempt, process, heartbeat
        self._started_at = clock.now
        self._host_seconds: dict[int, float] = {}  # of rank 0, and of all others together as rank 1
        self._measured: tuple[int, float] | None = None  # which of them is measured, since when

    def __enter__(self) -> VirtualLaunch:
        self._stack.enter_context(mock.patch("sdit.supervise.node_copy.shared_folder", self._node_folder))
        # No launcher is above a virtual rank.
        self._stack.enter_context(mock.patch("sdit.supervise.stop_request.processes_to_watch", lambda _world: []))
        return self

    def __exit__(self, *_: object) -> None:
        for manager in self._managers.values():
            manager.close()
        self._stack.close()

    def _node_folder(self) -> Path:
        path = self._root / f"node-{self._folder.owner // RANKS_PER_NODE}"
        path.mkdir(exist_ok=True)
        return path

    def start(self) -> Phase:
        """Start all supervisors, until each has a worker."""
        run_dir = self._root / "run"
        shared = RunFolder.create(run_dir)
        for rank in range(self._world):
            with self._as_rank(rank):
                manager = supervisor_of(self._rank(rank, run_dir), shared, self._worker_starter(rank))
                self._managers[rank] = ExitStack()
                self._supervisors[rank] = self._managers[rank].enter_context(manager)
        self._until(lambda: len(self._workers) == self._world)
        return self._phase("start")

    def run_healthy(self, seconds: float) -> Phase:
        """Run all ranks for some virtual seconds."""
        for _ in range(int(seconds / TICK_SECONDS)):
            self._tick()
        return self._phase("healthy run")

    def restart(self) -> Phase:
        """Kill the worker of one rank, and run until all ranks have a worker of the next attempt."""
        self._workers[self._world // 2][1].code = -signal.SIGKILL
        self._until(lambda: all(attempt == 2 for attempt, _, _ in self._workers.values()))
        return self._phase("restart after a fault")

    def stop(self) -> Phase:
        """End all workers as after an agreed stop, and run until all supervisors have ended."""
        for _, process, _ in self._workers.values():
            process.code = ExitCode.REQUEUE
        self._until(lambda: not self._supervisors)
        return self._phase("stop")

    def _rank(self, rank: int, run_dir: Path) -> SupervisedRank:
        node, local = divmod(rank, RANKS_PER_NODE)
        info = RankInfo(rank, self._world, local, min(RANKS_PER_NODE, self._world), "simulation")
        launch = LaunchIdentity("simulation", f"node-{node}", f"launcher of node {node}", "")
        member = Member(rank, uuid.uuid4().hex, f"n{node}", os.getpid(), "same", None, f"node-{node}", launch)
        job = Job([], run_dir, "same", lambda ranks: ranks)
        return SupervisedRank(job, SuperviseConfig(), info, {"MASTER_ADDR": "127.0.0.1"}, member)

    def _worker_starter(self, rank: int) -> Callable[..., WorkerProcess]:
        def start(
            _command: Sequence[str], _environment: Mapping[str, str], spec: WorkerSpec, heartbeat: Heartbeat
        ) -> WorkerProcess:
            process = VirtualProcess(rank, spec.stacks)
            heartbeat.enter(WorkerPhase.STEP, 1)
            self._workers[rank] = spec.attempt, process, heartbeat
            return WorkerProcess(process, spec, heartbeat)

        return start

    @contextmanager
    def _as_rank(self, rank: int) -> Iterator[None]:
        """Count for a rank. The time of the other ranks is measured for all of them together, because a clock also takes time."""
        self._folder.owner = rank
        if rank > 1:
            yield
            return
        now = time.thread_time()
        if self._measured is not None:
            before, since = self._measured
            self._host_seconds[before] = self._host_seconds.get(before, 0.0) + now - since
        self._measured = (rank, now)
        yield

    def _tick(self) -> None:
        """Advance the clock, let each worker make progress, and poll each supervisor once."""
        self._clock.now += TICK_SECONDS
        for rank, supervisor in list(self._supervisors.items()):
            _, process, heartbeat = self._workers.get(rank, (0, None, None))
            if process is not None and process.code is None and heartbeat is not None:
                heartbeat.progress()
            with self._as_rank(rank):
                code = supervisor.poll()
                if code is not None:
                    supervisor.close()
                    del self._supervisors[rank]
                    self._managers.pop(rank).close()

    def _until(self, is_reached: Callable[[], bool]) -> None:
        for _ in range(LONGEST_TICKS):
            if is_reached():
                return
            self._tick()
        raise RuntimeError(f"{self._world} ranks: the phase did not end within {LONGEST_TICKS * TICK_SECONDS:g} s")

    def _phase(self, name: str) -> Phase:
        """Return what was counted since the last phase."""
        seconds, self._started_at = self._clock.now - self._started_at, self._clock.now
        now = time.thread_time()
        if self._measured is not None:
            rank, since = self._measured
            self._host_seconds[rank] = self._host_seconds.get(rank, 0.0) + now - since
        host, self._host_seconds, self._measured = self._host_seconds, {}, None
        others = host.get(1, 0.0) / max(1, self._world - 1)
        host = {rank: host.get(0, 0.0) if rank == 0 else others for rank in range(self._world)}
        return Phase.of(name, self._world, RANKS_PER_NODE, seconds, self._folder.take(), host)


def supervise_ranks(world: int, root: Path, healthy_seconds: float) -> Iterator[Phase]:
    """Yield the phases of one launch of `world` ranks, whose run folder is below `root`."""
    _allow_descriptors(3 * world + 256)
    clock, folder = VirtualClock(), CountedFolder(root / "run")
    with clock.running(), folder.counting(), VirtualLaunch(world, folder, clock, root) as launch:
        yield launch.start()
        yield launch.run_healthy(healthy_seconds)
        yield launch.restart()
        yield launch.stop()


def _allow_descriptors(count: int) -> None:
    """Raise the limit of open files: each virtual worker has two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
