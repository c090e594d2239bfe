"""A run's folder made by hand, with everything that a report shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdit.config import Config, dump_config
from sdit.model import Assignment
from sdit.model.windows import expert_windows
from sdit.observe.routing import Snapshot
from sdit.observe.token_maps import TokenMap

BATCH, STEPS = 16, 60
DEPTH, TASKS, EXPERTS, TOP_K = 2, 40, 4, 2


def config(run_dir: Path, variant: str = "switch", has_moe: bool = False) -> Config:
    """A small model on the digits."""
    experts = {"count": EXPERTS, "top_k": TOP_K}
    model = {
        "variant": variant, "depth": DEPTH, "width": 16, "heads": 2, "input_size": 8, "channels": 1, "classes": 10,
        "timesteps": TASKS, "experts": experts,
    }  # fmt: skip
    if has_moe:
        model |= {"depth": 2 * DEPTH, "moe": {"experts": EXPERTS, "top_k": TOP_K, "every": 2}}
    train = {"steps": STEPS, "global_batch": BATCH}
    return Config.model_validate({"model": model, "train": train, "run_dir": str(run_dir)})


def record(step: int) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    loss = 1 / step + 0.1
    return {
        "step": step, "images_seen": step * BATCH, "loss": loss, "mse": 0.9 * loss, "vlb": 0.1 * loss, "prior_loss": 0.01,
        "grad_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 100.0, "step_seconds": BATCH / 100,
        "loss_by_timestep": [loss * (bin + 1) if bin != 3 else None for bin in range(20)],
        "expert_load": [[0.5, 0.5, 0.6, 0.4]] * DEPTH, "expert_load_max_over_mean": 1.2 + 0.1 * math.sin(step),
        "memory_bytes": {"resident": 5 * 10**8, "device": 0},
        "spent_since_logged": {"step_seconds": 0.16, "data_wait_seconds": 0.01, "forward_backward_seconds": 0.1,
                               "exchange_wait_seconds": 0.02, "optimizer_seconds": 0.03, "checkpoint_seconds": 0.05},
    } | ({"validation_loss": loss + 0.05, "validation_loss_by_timestep": [loss] * 20} if step % 20 == 0 else {})  # fmt: skip


def token_record(step: int) -> dict[str, Any]:
    """What a run with token-routed experts logs of them."""
    favour = 0.25 + 0.2 * math.exp(-step / 20)
    return {
        "aux_loss": 0.02 + 0.01 / step, "token_load_max_over_mean": 4 * favour, "token_dropped_fraction": 0.05 / step,
        "router_entropy": 1.2 - 0.3 * step / STEPS, "router_entropy_by_block": [1.2, 1.0],
        "token_load": [[favour, *[(1 - favour) / 3] * 3], [0.25] * 4],
    }  # fmt: skip


def token_map(images: int) -> TokenMap:
    """A map of blocks 1 and 3 whose experts prefer timesteps and corners of the image."""
    rng = np.random.default_rng(images)
    rows, columns = np.divmod(np.arange(16), 4)
    corner = np.stack([rows + columns, rows + 3 - columns, 3 - rows + columns, 6 - rows - columns], 1)
    time = 20 - np.abs(np.arange(20)[:, None] - np.arange(0, 20, 5)[None])
    by_time = rng.poisson(time * images / 320, (2, 20, EXPERTS))
    by_time[0, 19] = 0
    return TokenMap(images, [1, 3], by_time, rng.poisson(corner * images / 32, (2, 16, EXPERTS)), np.array([0, 9]))


def write_folder(folder: Path, variant: str = "switch", has_moe: bool = False) -> Path:
    """Write the files of a run that was restarted once. `has_moe`: it has token-routed experts."""
    run = config(folder, variant, has_moe)
    for name in ("samples", "routing", "logs", "checkpoints/images-000000000640"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(run))
    environment = {
        "sdit": "0.1",
        "ranks": 2,
        "expert_parallel": 2,
        "micro_batch": 8,
        "accumulation": 1,
        "device": "cpu",
    }
    environment |= {"packages": {"torch": "2.x"}, "command": ["train.py", "a=1"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    records = [record(step) | (token_record(step) if has_moe else {}) for step in range(1, STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    events = [
        (0, "start", "fresh start: no checkpoint"),
        (320, "skipped_step", "loss nan, gradient norm 1.0"),
        (640, "checkpoint", "images-000000000640 in 0.25 s"),
        (640, "start", "resumed at 640 images"),
    ]
    lines = [
        {
            "time": "2026-03-01T03:04:05+00:00",
            "images_seen": images,
            "step": images // BATCH,
            "event": kind,
            "text": text,
        }
        for images, kind, text in events
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt = {"attempt": 1, "restart": True, "exit_code": 70, "text": "rank 1, host n, step 41: killed by SIGKILL"}
    (folder / "logs" / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    (folder / "checkpoints" / "images-000000000640" / "manifest.json").write_text("{}")
    for images in (320, 640, 960):
        Image.new("L", (64, 64), images % 255).save(folder / "samples" / f"images-{images:012d}.png")
        if variant == "switch":
            snapshot(images, run).save(folder / "routing" / f"images-{images:012d}.npz")
        if has_moe:
            token_map(images).save(folder / "routing" / f"tokens-{images:012d}.npz")
    return folder


def snapshot(images: int, run: Config) -> Snapshot:
    """Random gates that follow some prior."""
    probs = np.random.default_rng(images).dirichlet(np.ones(EXPERTS), size=(DEPTH, TASKS)).astype(np.float32)
    assignment = Assignment(np.arange(DEPTH * EXPERTS), expert_windows(run.model))
    return Snapshot.take(images, probs, TOP_K, assignment)
