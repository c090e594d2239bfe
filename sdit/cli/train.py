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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdit.cli.checkout import checkout
from sdit.cli.parser import Parser, add_config_option, add_deepspeed_options, add_rank_option
from sdit.cli.presets import DEFAULT_CONFIG, DEFAULT_DEEPSPEED, deepspeed_file
from sdit.cli.process import exit_status, leave, run_command
from sdit.cli.training_rank import run_supervised, run_unsupervised
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
from sdit.launch_environment import find_rank
from sdit.output import divert_output
from sdit.supervise.job import Job
from sdit.supervise.start import supervise
from sdit.supervise.worker import WorkerContext

if TYPE_CHECKING:
    from sdit.train.engine_setup import WrapEngine


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("train", __doc__, config_manual())
    add = parser.add_argument
    add_deepspeed_options(parser, "DeepSpeed JSON: ZeRO stage, offload, buckets")
    add_config_option(add, "the run's config", DEFAULT_CONFIG)
    add("--run-dir", metavar="DIR", help="folder of the run, taken literally (instead of run_dir)")
    add_rank_option(add)
    add("overrides", nargs="*", metavar="key.sub=value", help="config overrides, see below")
    options = parser.parse_args(arguments)
    options.ds_config = options.ds_config or deepspeed_file(DEFAULT_DEEPSPEED)
    return options


def main(
    arguments: list[str] | None = None,
    *,
    worker_command: Sequence[str] | None = None,
    wrap_engine: WrapEngine | None = None,
) -> int:
    """Train a run and return its exit status.

    Tests inject faults here: `wrap_engine` replaces the engine of each rank, and `worker_command` starts a worker
    process that passes the same `wrap_engine`.
    """
    worker = WorkerContext.from_environment(os.environ)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    # -P: no modules of the current folder
    command = worker_command or [sys.executable, "-P", "-m", "sdit.cli.train", *arguments]
    code = exit_status(lambda: run_or_supervise(options, worker, command, wrap_engine))
    if worker.is_supervised:
        leave(code)
    return code


def run_or_supervise(
    options: argparse.Namespace, worker: WorkerContext, command: Sequence[str], wrap_engine: WrapEngine | None
) -> int:
    """Run as a training rank if a supervisor started this process. Otherwise start `command` and supervise it."""
    given = {"run_dir": options.run_dir, "checkpoint.resume": worker.resume}
    literal = {key: text for key, text in given.items() if text is not None}
    config = load_config(options.config, options.overrides, literal=literal)
    deepspeed = read_deepspeed_json(options.ds_config)
    info = find_rank(os.environ)
    divert_output(Path(config.run_dir) / "logs" / f"rank-{info.rank:03d}.output")

    def resolve() -> ResolvedRun:
        return resolve_run(config, deepspeed, options.ds_config, info.world, info.local_world)

    if worker.is_supervised:
        return run_supervised(resolve, info, worker, wrap_engine)
    # What needs no torch is refused here at once; the rank itself checks the rest, seconds later.
    resolved = resolve()
    check_trainable(config)
    if not config.supervise.enabled:
        return run_unsupervised(resolved, info, worker, wrap_engine)
    digest = hashlib.sha256((dump_config(config) + json.dumps(deepspeed, sort_keys=True)).encode()).hexdigest()
    steps = -(-config.train.total_images // config.train.global_batch)
    job = Job(command, Path(config.run_dir), digest, lambda ranks: largest_world(config, ranks), config.observe, steps)
    return supervise(job, config.supervise, info, rank_environment())


def rank_environment() -> dict[str, str]:
    """Return this process's environment, in which a rank imports the same sdit as this process, installed or not."""
    root = checkout()
    if root is None:
        return dict(os.environ)
    paths = filter(None, [str(root), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    run_command(main)
