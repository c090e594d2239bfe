#!/usr/bin/env python3
"""What replicated hot experts would save: bytes and the work of the most loaded rank, from choices recorded in training.

    python benchmarks/token_replicas.py

Trains a small model with token-routed experts on 8 x 8 digits in one process and records what its tokens choose in the last
steps. The choices are then placed on EP ranks of a larger model, B samples of 256 tokens per rank: the choices are the small
model's, D and the size of an expert those of the table. A replicated expert is computed where its tokens are, and each rank
sends its weights and their gradients once per micro-step. The hottest experts by the mean load of a block are replicated, as
many as cost least. Placements are by the mean loads, as `parallel.placement: balanced` finds them.

Cost: bytes of the group, and (max / mean work of the ranks - 1) x the bytes if each (token, expert) pair is sent to a random
rank. `sdit/expert_parallel/strategy.py` counts like this.

B samples of a rank, L tokens, D width, M experts of a block, k of a token, P ranks of a group, N = P B L tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_steps import training_step

from sdit.config import load_config, resolve_run
from sdit.distributed.comm import Comm, find_rank
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.rebalance import even_placement
from sdit.model.moe.token_local import LocalTokenDispatcher, LocalTokenPass
from sdit.train.setup import open_trainer

ROOT = Path(__file__).resolve().parent.parent
EXPERTS, TOP_K, TOKENS = 8, 2, 256
WIDTHS = {"S/2": 384, "B/2": 768, "XL/2": 1152}
BALANCES = {"aux": "balance: aux, aux_weight: 0.01", "bias": "balance: bias, bias_rate: 0.001, score: sigmoid"}
TRANSFERS = 4  # of a row: to the rank and back, forward and backward. An expert is sent twice: weights and gradients
FLOATS = 12  # D^2 numbers of a gated expert with hidden width 4 D


class Recorder(LocalTokenDispatcher):
    """Keeps the passes of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[LocalTokenPass] = []

    def forward_pass(self) -> LocalTokenPass:
        """Return a new pass, and keep it."""
        self.passes.append(super().forward_pass())
        return self.passes[-1]


def record(comm: Comm, balance: str, steps: int, recorded: int) -> np.ndarray:
    """Return the chosen experts (blocks, samples, L, k) of the last `recorded` of `steps` training steps."""
    moe = f"{{experts: {EXPERTS}, top_k: {TOP_K}, shared: 1, shared_ratio: 1, {BALANCES[balance]}}}"
    size = ["model.variant=dit", "model.patch_size=1", "model.depth=4", "model.width=64", "model.heads=4"]
    more = ["train.global_batch=32", "optimizer.learning_rate=1e-3", f"train.steps={steps}", "parallel.threads=1"]
    with tempfile.TemporaryDirectory() as folder:
        words = [*size, *more, f"model.moe={moe}", f"run_dir={folder}/run", "train.log_every_steps=1000000"]
        config = load_config(ROOT / "configs" / "digits.yaml", words)
        with open_trainer(resolve_run(config, {}, "replicas", 1, 1), comm) as trainer:
            step, recorder = training_step(trainer), Recorder()
            for number in range(steps):
                if number == steps - recorded:
                    trainer.context.model.token_dispatcher = recorder
                step()
    chosen = [torch.stack([each.choices[block].chosen for block in sorted(each.choices)]) for each in recorder.passes]
    return torch.cat(chosen, dim=1).numpy()


class Cost(NamedTuple):
    """Of one set of replicas, means over micro-batches and blocks: bytes of a group, and max / mean work of its ranks."""

    bytes: float
    imbalance: float

    def total(self, pair_bytes: float) -> float:
        """Return the cost in bytes, see above. `pair_bytes`: if each pair is sent to a random rank."""
        return self.bytes + (self.imbalance - 1) * pair_bytes


def cost(chosen: np.ndarray, owners: np.ndarray, replicated: np.ndarray, width: int) -> Cost:
    """Return the cost of micro-batches `chosen` (batches, P, B L, k) of one block. `replicated` is (M,) bool."""
    batches, ranks = chosen.shape[:2]
    source = np.arange(ranks)[None, :, None, None]
    where = np.where(replicated[chosen], source, owners[chosen])
    serves = (where[..., None] == np.arange(ranks)).any(axis=3)  # (batches, P, B L, P)
    rows = serves.sum() - serves[:, np.arange(ranks), :, np.arange(ranks)].sum()
    work = np.stack([np.bincount(each.ravel(), minlength=ranks) for each in where])
    scale = TOKENS / 64  # tokens of the digits
    sent = TRANSFERS * rows / batches * scale * width + 2 * replicated.sum() * (ranks - 1) * FLOATS * width**2
    return Cost(float(4 * sent), float((work.max(1) / work.mean(1)).mean()))


def best_replicas(chosen: np.ndarray, ranks: int, samples: int, width: int) -> tuple[list[float], Cost, Cost, Cost]:
    """Return the mean number of replicas per block, and the costs in order, placed by load, and with replicas.

    `chosen` (blocks, samples, L, k). The numbers of replicas and the costs are means over the blocks.
    """
    blocks, count, tokens, top_k = chosen.shape
    batches = count // (ranks * samples)
    grouped = chosen[:, : batches * ranks * samples].reshape(blocks, batches, ranks, samples * tokens, top_k)
    loads = np.stack([np.bincount(each.ravel(), minlength=EXPERTS) for each in grouped])
    in_order = np.tile(np.arange(EXPERTS) // (EXPERTS // ranks), (blocks, 1))
    present = ExpertPlacement(in_order, np.zeros(in_order.shape, dtype=bool), ranks)
    owners = even_placement(loads, present, 0).expert_to_rank
    pair_bytes = 4 * TRANSFERS * samples * TOKENS * top_k * (ranks - 1) * width
    columns: list[list[Cost]] = []
    replicas = []
    for block in range(blocks):
        hottest = np.argsort(-loads[block], kind="stable")
        sets = [np.isin(np.arange(EXPERTS), hottest[:number]) for number in range(EXPERTS + 1)]
        costs = [cost(grouped[block], owners[block], each, width) for each in sets]
        best = int(np.argmin([each.total(pair_bytes) for each in costs]))
        replicas.append(float(best))
        columns.append([cost(grouped[block], in_order[block], sets[0], width), costs[0], costs[best]])
    means = [Cost(*np.mean(np.array(column), axis=0).tolist()) for column in zip(*columns, strict=True)]
    return replicas, means[0], means[1], means[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the small model")
    parser.add_argument(
        "--recorded", type=int, default=48, help="last steps whose choices are recorded, 32 samples each"
    )
    parser.add_argument("--samples", type=int, default=32, help="B, samples of a rank and micro-step")
    options = parser.parse_args()
    print(
        f"M = {EXPERTS}, k = {TOP_K}, {options.samples} samples of {TOKENS} tokens per rank, float32, {options.steps} steps"
    )
    print(
        "| balance | hottest / mean | EP | size | slowest rank: in order, by load, replicas | bytes | cost | replicas |"
    )
    print("|" + " --- |" * 8)
    torch.set_num_threads(1)
    with Comm(find_rank({})) as comm:
        for balance in BALANCES:
            report(balance, record(comm, balance, options.steps, options.recorded), options.samples)


def report(balance: str, chosen: np.ndarray, samples: int) -> None:
    """Print the lines of a run that has chosen these experts (blocks, samples, L, k)."""
    loads = np.stack([np.bincount(each.ravel(), minlength=EXPERTS) for each in chosen])
    hot = (loads.max(1) / loads.mean(1)).mean()
    for ranks, (size, width) in product((2, 4, 8), WIDTHS.items()):
        replicas, first, placed, best = best_replicas(chosen, ranks, samples, width)
        pair_bytes = 4 * TRANSFERS * samples * TOKENS * TOP_K * (ranks - 1) * width
        cells = [
            balance, f"{hot:.2f}", str(ranks), size,
            f"{first.imbalance:.2f}, {placed.imbalance:.2f}, {best.imbalance:.2f}", f"{best.bytes / placed.bytes:.2f}",
            f"{best.total(pair_bytes) / placed.total(pair_bytes):.2f}", f"{np.mean(replicas):.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
