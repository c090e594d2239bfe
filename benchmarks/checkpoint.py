#!/usr/bin/env python3
"""What an asynchronous checkpoint costs the training loop: steps of one run with and without a write in the background.

usage: python benchmarks/checkpoint.py [--rounds 6] [--batch 16]
       python benchmarks/checkpoint.py --saves --size B/2 --ranks 4

One rank trains; every other block of `BLOCK` steps begins with an asynchronous save, so that other load on the machine falls
on both kinds of block alike. Two costs are told apart: `blocked` is what the loop waits for (the copy to memory and the
commit's part in the loop); `whole` also counts what the writing thread takes from a machine whose cores all compute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from meter import Meter
from ranks import start_ranks
from train_steps import training_step

from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.train.loop import Trainer
from sdit.train.setup import open_trainer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 12  # steps between two saves
SAVES = 5
SIZES = {"S/2": (12, 384, 6), "B/2": (12, 768, 12)}  # depth, width, heads; the images are the digits


def measure(trainer: Trainer, rounds: int) -> tuple[list[float], list[float], list[float], int]:
    """Per round: mean seconds of a step without and with a save, seconds blocked by the save; bytes of a checkpoint."""
    saver, step = trainer.tasks.checkpoints.saver, training_step(trainer)
    meter = Meter(saver, ("save", "advance"))

    def block(save: bool) -> float:
        started = time.perf_counter()
        if save:
            saver.save()
        for _ in range(BLOCK):
            step()
        return (time.perf_counter() - started) / BLOCK

    block(save=False)
    block(save=True)  # the first copy goes into new memory
    plain, saving, blocked = [], [], []
    for _ in range(rounds):
        saver.finish()
        plain.append(block(save=False))
        meter.seconds = 0.0
        saving.append(block(save=True))
        blocked.append(meter.seconds)
    saver.finish()
    return plain, saving, blocked, trainer.context.state.kinds.checkpoint_bytes()


def save_in_place(trainer: Trainer, saves: int) -> list[float]:
    """Seconds of each of several saves in a row, on all ranks together."""
    seconds = []
    for _ in range(saves):
        trainer.context.comm.barrier()
        started = time.perf_counter()
        trainer.tasks.checkpoints.saver.save(must_succeed=True)
        seconds.append(time.perf_counter() - started)
    return seconds


def report_saves(trainer: Trainer, size: str) -> None:
    """A row of the table in docs/performance.md."""
    seconds, size_bytes = save_in_place(trainer, SAVES), trainer.context.state.kinds.checkpoint_bytes()
    if trainer.context.comm.is_first:
        spread = f"{min(seconds):.1f}-{max(seconds):.1f} s"
        print(f"{size}, 3 experts, {size_bytes / 1e6:.0f} MB, {trainer.context.comm.world} ranks: {spread}", flush=True)


def report_background(trainer: Trainer, rounds: int) -> None:
    """What the loop waits for, and what whole steps cost."""
    plain, saving, blocked, size = measure(trainer, rounds)
    ratio = statistics.median(b / (BLOCK * p) for b, p in zip(blocked, plain, strict=True))
    worst = max(b / p for b, p in zip(blocked, plain, strict=True))
    whole = [(s - p) / p for s, p in zip(saving, plain, strict=True)]
    print(f"{size / 1e6:.0f} MB, a save every {BLOCK} steps of {statistics.median(plain):.2f} s")
    print(f"blocked: {100 * ratio:.2f} % of all steps (a save blocks {100 * worst:.1f} % of one step at worst)")
    print(f"whole: {100 * statistics.median(whole):+.1f} % (from {100 * min(whole):+.1f} to {100 * max(whole):+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="pairs of blocks compared")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--saves", action="store_true", help="time saves in place instead, for --size on --ranks")
    parser.add_argument("--size", choices=SIZES, default="S/2")
    parser.add_argument("--ranks", type=int, default=1, help="processes to start")
    options = parser.parse_args()
    info = find_rank(os.environ)
    if info.world < options.ranks:
        sys.exit(start_ranks(options.ranks))
    torch.set_num_threads(1)
    depth, width, heads = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder, Comm(info) as comm:
        config = load_config(
            ROOT / "configs" / "digits.yaml",
            [f"model.depth={depth}", f"model.width={width}", f"model.heads={heads}", "model.experts.count=3",
             "parallel.expert=1", "train.steps=100000", f"checkpoint.asynchronous={str(not options.saves).lower()}",
             "checkpoint.every_steps=null", f"train.global_batch={options.batch}", f"run_dir={comm.from_first(folder)}"],
        )  # fmt: skip
        run = resolve_run(config, {"zero_optimization": {"stage": 1}}, "benchmark", comm.world, comm.info.local_world)
        with open_trainer(run, comm) as trainer:
            if options.saves:
                report_saves(trainer, options.size)
            else:
                report_background(trainer, options.rounds)


if __name__ == "__main__":
    main()
