"""The process of one training rank, with or without a supervisor."""

from __future__ import annotations

import gc
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.caches import use_cache
from sdit.config import ResolvedRun
from sdit.errors import ExitCode, SditError, one_line
from sdit.redact import redact
from sdit.supervise.lock import RunLock
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.unfinished import clear
from sdit.supervise.worker import WorkerContext

if TYPE_CHECKING:
    from sdit.distributed.comm import RankInfo
    from sdit.train.engine_setup import WrapEngine

# NCCL also reports errors of this rank, such as a GPU that two ranks use or a wrong interface.
LOST_OTHERS = re.compile(
    r"gloo|ncclRemoteError|NCCL communicator was aborted|Watchdog caught collective operation timeout|"
    r"ncclUniqueId .* got error|Connection (was likely )?(reset|closed|refused)|Broken pipe",
    re.IGNORECASE,
)


def run_supervised(
    resolve: Callable[[], ResolvedRun], info: RankInfo, worker: WorkerContext, wrap_engine: WrapEngine | None
) -> int:
    """Run the rank of a supervisor. If it fails, report the reason to the supervisor, which reports it to the user.

    The traceback of a rank that merely lost the others is not printed, but it is in the file of stack dumps.
    """
    try:
        return run(resolve(), info, worker, wrap_engine)
    except SditError as error:
        worker.heartbeat.fail(redact(str(error)), secondary=False)
        return error.exit_code
    except Exception as error:
        worker.append_stacks(redact(traceback.format_exc()))
        secondary = has_lost_others(error)
        text = redact(one_line(f"{type(error).__name__}: {error}"))
        worker.heartbeat.fail(f"lost the other ranks: {text}" if secondary else text, secondary)
        if secondary:
            print(f"rank {info.rank}: lost the other ranks", file=sys.stderr)
        else:
            traceback.print_exc()
        return ExitCode.CRASH


def has_lost_others(error: Exception) -> bool:
    """Return whether an error only says that another rank is gone, so that this rank is not the root cause."""
    return LOST_OTHERS.search(str(error)) is not None


def run_unsupervised(
    resolved: ResolvedRun, info: RankInfo, worker: WorkerContext, wrap_engine: WrapEngine | None
) -> int:
    """Run the rank under the run lock, which rank 0 takes."""
    run_dir = Path(resolved.config.run_dir)
    with RunLock(run_dir) if info.rank == 0 else nullcontext() as lock:
        if lock is not None:
            lock.follow(RunFolder(run_dir).anchor)
            lock.keep_beating()
        code = run(resolved, info, worker, wrap_engine)
        if lock is not None and code == ExitCode.DONE:
            clear(run_dir)
        return code


def run(resolved: ResolvedRun, info: RankInfo, worker: WorkerContext, wrap_engine: WrapEngine | None) -> int:
    """Join the process group, observe the run and train it; return the exit status."""
    config = resolved.config
    use_cache([Path(config.run_dir) / "cache"])
    gc.disable()  # what imports create stays: searching it for garbage takes 0.6 s of 4.4 s of CPU time
    from sdit.distributed.device import prepare_device  # torch is slow to import: not for --help and wrong configs

    prepare_device(config.parallel.device, config.train)
    from sdit.distributed.comm import Comm, set_threads
    from sdit.observe.metrics import PrometheusObserver
    from sdit.observe.observers import build_observers
    from sdit.train.engine_setup import check_run
    from sdit.train.setup import open_trainer

    gc.freeze()
    gc.enable()
    check_run(resolved)
    set_threads(info, config.parallel.threads)
    run_dir = Path(config.run_dir)
    folder = RunFolder(run_dir) if worker.is_supervised else RunFolder.create(run_dir)
    metrics = None if worker.metrics_path is None else PrometheusObserver(config, run_dir, info, worker.metrics_path)
    observers = build_observers(config, folder, info, metrics, worker.heartbeat)
    try:
        with Comm(info, config.supervise.collective_seconds, config.parallel.device) as comm:
            try:
                resolved = resolved.on_nodes(comm.gather(info.local_world))
                with open_trainer(resolved, comm, observers, worker, wrap_engine) as trainer:
                    code = int(trainer.run())
            finally:
                observers.close()
    except Exception:
        folder.check()  # if the folder is gone, that is the reason of any other error
        raise
    folder.check()
    return code
