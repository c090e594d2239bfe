"""What a checkpoint costs the training loop, and a sampler step by precision."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from rows import NAMES, Machine, Row
from small_run import comm_of_one, model_keys, open_run
from train_steps import training_step

from sdit.distributed.comm import Comm
from sdit.model import build_model, init_weights
from sdit.model.precision import tf32_products


def measure(machine: Machine) -> list[Row]:
    """The rows of each size."""
    rows = []
    with comm_of_one(machine) as comm:
        for size in ("tiny",) if machine.is_tiny else ("S/2", "XL/2"):
            rows += [*checkpoint_rows(machine, comm, size), *sampling_rows(machine, size)]
    return rows


def checkpoint_rows(machine: Machine, comm: Comm, size: str) -> Iterator[Row]:
    """Seconds for which asynchronous saves hold up the loop."""
    keys = {
        "model": model_keys(machine, size),
        "train": {"steps": 1000, "global_batch": 8, "precision": "bf16"},
        "checkpoint": {"asynchronous": True},
    }
    with open_run(machine, comm, keys) as (trainer, _):
        step, saver = training_step(trainer), trainer.tasks.checkpoints.saver
        for turn in ("first", "second"):
            step()
            machine.settle()
            started = time.perf_counter()
            saver.save()
            seconds = time.perf_counter() - started
            saver.finish()
            gigabytes = trainer.context.state.kinds.checkpoint_bytes() / 1e9
            yield Row(f"{size}: the loop waits for the {turn} save of {gigabytes:.1f} GB", seconds, "s")


def sampling_rows(machine: Machine, size: str) -> Iterator[Row]:
    """A model call of a sampler, which shares its timestep among the images."""
    model = build_model(model_keys(machine, size)).eval()
    init_weights(model, 0)
    side = model.config.input_size
    x, y = (
        torch.randn(32, model.config.channels, side, side, device=machine.device),
        torch.zeros(32, dtype=torch.long, device=machine.device),
    )
    for name, dtype, is_tf32 in (
        (NAMES[torch.float32], torch.float32, False),
        ("TF32", torch.float32, True),
        (NAMES[torch.bfloat16], torch.bfloat16, False),
    ):
        model.to(machine.device, dtype)
        with torch.no_grad(), tf32_products(is_tf32):
            spent = machine.milliseconds(lambda: model(x, 500, y), 10)
        yield Row(f"{size}: model call of 32 images, {name}", spent, "ms")
