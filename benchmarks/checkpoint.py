#!/usr/bin/env python3
"""What an asynchronous checkpoint costs the training loop: steps of one run with and without a write in the background.

usage: python benchmarks/checkpoint.py [--rounds 6] [--batch 16]

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

from sdit.configfile import load_config
from sdit.parallel.comm import Comm, find_rank
from sdit.train.build import open_trainer
from sdit.train.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 12  # steps between two saves


class Meter:
    """Seconds that the loop spends in the saver's methods."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds = 0.0
        for name in ("save", "hear"):
            setattr(trainer.saver, name, self._timed(getattr(trainer.saver, name)))

    def _timed(self, method):
        def call(*arguments):
            started = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - started
            return result

        return call


def measure(trainer: Trainer, rounds: int) -> tuple[list[float], list[float], list[float], int]:
    """Per round: mean seconds of a step without and with a save, seconds blocked by the save; bytes of a checkpoint."""
    meter, requests = Meter(trainer), trainer.loader.batches(trainer._requests())

    def block(save: bool) -> float:
        started = time.perf_counter()
        if save:
            trainer.saver.save()
        for _ in range(BLOCK):
            trainer._step([next(requests)])
            trainer.state.clock = trainer.state.clock.after(trainer.batch.global_batch)
        return (time.perf_counter() - started) / BLOCK

    block(save=False)
    block(save=True)  # the first copy goes into new memory
    plain, saving, blocked = [], [], []
    for _ in range(rounds):
        trainer.saver.finish()
        plain.append(block(save=False))
        meter.seconds = 0.0
        saving.append(block(save=True))
        blocked.append(meter.seconds)
    trainer.saver.finish()
    return plain, saving, blocked, trainer.state.checkpoint_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--size", default="S/2")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Comm(find_rank(os.environ)) as comm:
        config = load_config(
            ROOT / "configs" / "digits.yaml",
            ["model.depth=12", "model.width=384", "model.heads=6", "train.steps=100000", "checkpoint.asynchronous=true",
             "checkpoint.every_steps=null", f"train.global_batch={options.batch}", f"run_dir={folder}"],
        )  # fmt: skip
        with open_trainer(config, {"zero_optimization": {"stage": 1}}, "benchmark", comm) as trainer:
            plain, saving, blocked, size = measure(trainer, options.rounds)
    ratio = statistics.median(b / (BLOCK * p) for b, p in zip(blocked, plain, strict=True))
    worst = max(b / p for b, p in zip(blocked, plain, strict=True))
    whole = [(s - p) / p for s, p in zip(saving, plain, strict=True)]
    print(f"{size / 1e6:.0f} MB, a save every {BLOCK} steps of {statistics.median(plain):.2f} s")
    print(f"blocked: {100 * ratio:.2f} % of all steps (a save blocks {100 * worst:.1f} % of one step at worst)")
    print(f"whole: {100 * statistics.median(whole):+.1f} % (from {100 * min(whole):+.1f} to {100 * max(whole):+.1f})")


if __name__ == "__main__":
    main()
