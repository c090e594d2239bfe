#!/usr/bin/env python3
"""What the switch costs: Switch-DiT against dense DiT of this code, S/2 on 32 x 32 x 4 latents, as ratios within one run.

The models take turns step by step, so that other load on the machine falls on both alike; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from sdit.diffusion import build_objective
from sdit.model import build_model, init_weights, prior_divergence, solve_assignment
from sdit.model.dit import DiffusionTransformer

DEPTH, WIDTH, HEADS, PATCH = 12, 384, 6, 2


def make_model(variant: str, kind: str = "linear") -> DiffusionTransformer:
    """An S/2 model with all weights drawn at random: zero gates would let branches be skipped by luck."""
    model = build_model(
        {"variant": variant, "depth": DEPTH, "width": WIDTH, "heads": HEADS, "patch_size": PATCH, "input_size": 32,
         "channels": 4, "classes": 1000, "experts": {"count": 3, "top_k": 2, "kind": kind}}
    )  # fmt: skip
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def train_step(model: DiffusionTransformer, batch: int) -> Callable[[], dict[str, float]]:
    """A closure that takes one optimizer step and returns its seconds and those of the prior loss inside it."""
    objective = build_objective({"schedule": "linear"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x0, noise = torch.randn(batch, 4, 32, 32), torch.randn(batch, 4, 32, 32)
    t, y = torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))

    def step() -> dict[str, float]:
        started = time.perf_counter()
        prior_seconds = 0.0
        assignment = None
        if model.config.variant == "switch":
            assignment = solve_assignment(model.all_gate_probs(), model.config)
            prior_seconds = time.perf_counter() - started
        parts = objective(model, x0, t, y, noise)
        loss = parts.loss.mean()
        if assignment is not None:
            begin = time.perf_counter()
            loss = loss + prior_divergence(parts.output.routing, assignment).mean()
            prior_seconds += time.perf_counter() - begin
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"step": time.perf_counter() - started, "prior": prior_seconds}

    return step


def sample_step(model: nn.Module, batch: int) -> Callable[[], dict[str, float]]:
    """A closure that predicts once for a batch that shares its timestep, as a sampler does."""
    x, y = torch.randn(batch, 4, 32, 32), torch.randint(0, 1000, (batch,))

    @torch.no_grad()
    def step() -> dict[str, float]:
        started = time.perf_counter()
        model(x, 500, y)
        return {"step": time.perf_counter() - started, "prior": 0.0}

    return step


def race(steps: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over `rounds` turns, after one warm-up: each step over DiT's of the same turn, and the prior's share."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        results = {name: step() for name, step in steps.items()}
        for name, result in results.items():
            if turn:
                shares = {"ratio": result["step"] / results["DiT"]["step"], "prior": result["prior"] / result["step"]}
                seen[name].append(shares)
    return {
        name: {key: statistics.median(result[key] for result in results) for key in ("ratio", "prior")}
        for name, results in seen.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    models = {"DiT": make_model("dit"), "Switch-DiT": make_model("switch"), "DTR": make_model("dtr")}
    training = race({name: train_step(model, options.batch) for name, model in models.items()}, options.rounds)
    for model in models.values():
        model.eval()
    sampling = race({name: sample_step(model, options.batch) for name, model in models.items()}, 3 * options.rounds)
    print(
        f"S/2, 32 x 32 x 4 latents, batch {options.batch}, {options.threads} threads, median of {options.rounds} steps in turn"
    )
    print("| model | train step / DiT | sampling step / DiT | prior loss / train step |")
    print("|---|---|---|---|")
    for name in models:
        ratios = f"{training[name]['ratio']:.3f} | {sampling[name]['ratio']:.3f}"
        print(f"| {name} | {ratios} | {100 * training[name]['prior']:.1f} % |")


if __name__ == "__main__":
    main()
