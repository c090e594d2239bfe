"""Train a run, or resume it: the same command again resumes from the newest good checkpoint.

  sdit train                                                   the embedded digits, minutes on two cores
  sdit train --config digits --run-dir runs/mine train.steps=2000 optimizer.learning_rate=5e-4
  sdit train --config mine.yaml --ds_config zero2              a file, and a preset (sdit config list)
  deepspeed --num_gpus 2 launcher/train.py --ds_config configs/deepspeed/zero1.json
  deepspeed --num_gpus 2 --module sdit.cli.train               without a checkout; torchrun: -m sdit.cli.train
  mpirun -n 4 sdit train
  srun sdit train

SIGTERM, SIGUSR1, SIGINT or SIGHUP saves after the current step and ends with 75.
Exit status: 0 done, 64 wrong command line, 65 bad data or a diverged run, 70 crash, 74 file system error,
75 stopped and saved (the same command resumes), 78 impossible config. Only 70, 74 and 75 are worth a retry.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from sdit.caches import use_cache
from sdit.cli.checkout import checkout
from sdit.cli.parser import Parser, add_config_option, add_deepspeed_options, add_rank_option
from sdit.cli.presets import DEFAULT_CONFIG, DEFAULT_DEEPSPEED, deepspeed_file
from sdit.cli.process import exit_status, leave, run_command
from sdit.config import (
    ResolvedRun,
    check_trainable,
    config_manual,
    dump_config,
    largest_world,
    load_config,
    read_deepspeed_json,
    resolve_run,
)
from sdit.errors import ExitCode, SditError, one_line
from sdit.launch_environment import find_rank
from sdit.output import divert_output
from sdit.redact import redact
from sdit.supervise.fault import Fault
from sdit.supervise.job import Job
from sdit.supervise.lock import RunLock
from sdit.supervise.run_folder import RunFolder
from sdit.supervise.start import supervise
from sdit.supervise.unfinished import clear
from sdit.supervise.worker import WorkerContext

LOST_OTHERS = re.compile(r"gloo|NCCL|Connection (reset|closed|refused)|Broken pipe", re.IGNORECASE)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("train", __doc__, config_manual())
    add = parser.add_argument
    fault_help = "tests only (SDIT_FAULTS=1): make a rank misbehave"
    add_deepspeed_options(parser, "DeepSpeed JSON: ZeRO stage, offload, buckets")
    add_config_option(add, "the run's config", DEFAULT_CONFIG)
    add("--run-dir", metavar="DIR", help="folder of the run, taken literally (instead of run_dir)")
    add_rank_option(add)
    add("--fault", type=_fault, action="append", default=[], metavar="KIND@RANK:STEP", help=fault_help)
    add("overrides", nargs="*", metavar="key.sub=value", help="config overrides, see below")
    options = parser.parse_args(arguments)
    options.ds_config = options.ds_config or deepspeed_file(DEFAULT_DEEPSPEED)
    if options.fault and os.environ.get("SDIT_FAULTS") != "1":
        parser.error("--fault is for tests: it needs SDIT_FAULTS=1 in the environment")
    return options


def _fault(text: str) -> Fault:
    try:
        return Fault.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    rank = WorkerContext.from_environment(os.environ)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    command = [sys.executable, "-P", "-m", "sdit.cli.train", *arguments]  # -P: no modules of the current folder
    code = exit_status(lambda: run_or_supervise(options, rank, command))
    if rank.is_supervised:
        leave(code)
    return code


def run_or_supervise(options: argparse.Namespace, rank: WorkerContext, command: list[str]) -> int:
    """Run as a training rank if a supervisor started this process. Otherwise start `command` and supervise it."""
    given = {"run_dir": options.run_dir, "checkpoint.resume": rank.resume}
    literal = {key: text for key, text in given.items() if text is not None}
    config = load_config(options.config, options.overrides, literal=literal)
    deepspeed = read_deepspeed_json(options.ds_config)
    info = find_rank(os.environ)
    divert_output(Path(config.run_dir) / "logs" / f"rank-{info.rank:03d}.output")
    if rank.is_supervised:
        return last_words(
            rank,
            lambda: run(options, resolve_run(config, deepspeed, options.ds_config, info.world, info.local_world), rank),
        )
    # What needs no torch is refused here at once; the rank itself checks the rest, seconds later.
    resolved = resolve_run(config, deepspeed, options.ds_config, info.world, info.local_world)
    check_trainable(config)
    run_dir = Path(config.run_dir)
    if config.supervise.enabled:
        digest = hashlib.sha256((dump_config(config) + json.dumps(deepspeed, sort_keys=True)).encode()).hexdigest()
        steps = -(-config.train.total_images // config.train.global_batch)
        job = Job(command, run_dir, digest, lambda ranks: largest_world(config, ranks), config.observe, steps)
        return supervise(job, config.supervise, info, rank_environment())
    with RunLock(run_dir) if info.rank == 0 else nullcontext() as lock:
        if lock is not None:
            lock.follow(RunFolder(run_dir).anchor)
            lock.keep_beating()
        code = run(options, resolved, rank)
        if lock is not None and code == ExitCode.DONE:
            clear(run_dir)
        return code


def rank_environment() -> dict[str, str]:
    """Return this process's environment, in which a rank imports the same sdit as this process, installed or not."""
    root = checkout()
    paths = [os.environ.get("PYTHONPATH", "")]
    return (
        {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), *paths]))} if root else dict(os.environ)
    )


def last_words(rank: WorkerContext, work: Callable[[], int]) -> int:
    """Do a rank's work. If it fails, report the reason to its supervisor, which reports it to the user.

    A rank that merely lost the others needs no traceback.
    """
    try:
        return work()
    except SditError as error:
        rank.heartbeat.fail(redact(str(error)), secondary=False)
        return error.exit_code
    except Exception as error:
        secondary = LOST_OTHERS.search(str(error)) is not None
        text = redact(one_line(f"{type(error).__name__}: {error}"))
        rank.heartbeat.fail(f"lost the other ranks: {text}" if secondary else text, secondary)
        if secondary:
            print(f"rank {os.environ['RANK']}: lost the other ranks", file=sys.stderr)
        else:
            traceback.print_exc()
        return ExitCode.CRASH


def run(options: argparse.Namespace, resolved: ResolvedRun, rank: WorkerContext) -> int:
    """Run as one training rank."""
    config = resolved.config
    use_cache([Path(config.run_dir) / "cache"])
    from sdit.distributed.comm import Comm, set_threads  # torch is slow to import: not for --help and wrong configs
    from sdit.distributed.comm import find_rank as find_launched
    from sdit.train.setup import check_run, open_trainer

    info = find_launched(os.environ)
    check_run(resolved)
    set_threads(info, config.parallel.threads)
    from sdit.observe.folder_watch import FolderWatch
    from sdit.observe.metrics import PrometheusObserver
    from sdit.observe.observers import build_observers

    run_dir = Path(config.run_dir)
    folder = RunFolder(run_dir) if rank.is_supervised else RunFolder.create(run_dir)
    page = None if rank.metrics_path is None else PrometheusObserver(config, run_dir, info, rank.metrics_path)
    observers = build_observers(config, folder, info, page, FolderWatch(folder, rank.heartbeat))
    try:
        with Comm(info, device=config.parallel.device) as comm:
            try:
                with open_trainer(resolved, comm, observers, rank, options.fault) as trainer:
                    code = int(trainer.run())
            finally:
                observers.close()
    except Exception:
        folder.check()  # if the folder is gone, that is the reason of any other error
        raise
    folder.check()
    return code


if __name__ == "__main__":
    run_command(main)
