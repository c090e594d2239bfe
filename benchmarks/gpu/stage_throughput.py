"""Training steps of whole models: time, images per second, model-FLOPs utilization, and memory against the planner's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rows import Machine, Row
from small_run import ZERO_1, comm_of_one, model_keys, open_run
from train_steps import training_step

from sdit.config import ResolvedRun
from sdit.distributed.comm import Comm
from sdit.model.flops import flops_per_image
from sdit.planner.layout import plan_job
from sdit.planner.memory import plan_memory

WARM_STEPS, STEPS = 4, 15
OVERLAPPED = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000}}


@dataclass(frozen=True)
class Case:
    """A model with a batch, and what differs from the defaults."""

    name: str
    size: str
    batch: int
    parallel: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    moe: Mapping[str, Any] | None = None


def cases(machine: Machine) -> Iterator[Case]:
    """What is measured, the most valuable first."""
    if machine.is_tiny:
        yield Case("tiny", "S/2", 8, {"compile": False}, ZERO_1)
        return
    for size, batch in (("S/2", 256), ("XL/2", 32), ("S/2", 32), ("XL/2", 64)):
        yield Case("eager", size, batch, {"compile": False}, ZERO_1)
        yield Case("compiled", size, batch, {"compile": True}, ZERO_1)
        yield Case("compiled, ZeRO 2 with overlap", size, batch, {"compile": True}, OVERLAPPED)
    yield Case("token-routed experts", "S/2", 256, {"compile": True}, ZERO_1, {"experts": 8, "balance": "aux"})


def measure(machine: Machine) -> list[Row]:
    """The rows of all cases. One that fails is reported, and the others are measured."""
    peak_teraflops = _peak_teraflops(machine)
    rows = []
    with comm_of_one(machine) as comm:
        for case in cases(machine):
            try:
                rows += measure_case(machine, comm, case, peak_teraflops)
            except Exception as error:
                text = str(error).split("\n", 1)[0]
                rows.append(Row(f"{case.size}, {case.batch} images, {case.name}", f"failed: {text}", is_good=False))
    return rows


def measure_case(machine: Machine, comm: Comm, case: Case, peak_teraflops: float) -> list[Row]:
    """Time and memory of one case."""
    token_routed = {} if case.moe is None else {"variant": "dit", "moe": case.moe}
    keys = {
        "model": model_keys(machine, case.size) | token_routed,
        "parallel": {"device": machine.device.type, **case.parallel},
        "train": {"steps": 1000, "global_batch": case.batch, "precision": "bf16"},
    }
    started = time.perf_counter()
    with open_run(machine, comm, keys, case.deepspeed) as (trainer, run):
        step = training_step(trainer)
        step()
        machine.settle()
        first_seconds = time.perf_counter() - started
        for _ in range(0 if machine.is_tiny else WARM_STEPS):
            step()
        machine.reset_peak()
        spent = machine.milliseconds(step, STEPS)
        peak = machine.peak_bytes()
    flops = flops_per_image(run.config.model).train * case.batch
    planned = planned_bytes(run, machine, case)
    name = f"{case.size}, {case.batch} images, {case.name}"
    return [
        Row(name, spent, "ms per step"),
        Row(f"{name}: speed", 1e3 * case.batch / spent, "images/s"),
        Row(f"{name}: model FLOPs over the product's", 100 * flops / spent / 1e9 / peak_teraflops, "%"),
        Row(f"{name}: memory", peak / 2**30, f"GiB; the planner says {planned / 2**30:.2f}"),
        Row(f"{name}: first step, with start and compilation", first_seconds, "s"),
    ]


def planned_bytes(run: ResolvedRun, machine: Machine, case: Case) -> int:
    """The planner's peak for the rank."""
    job = plan_job(run.config, dict(case.deepspeed), "the check", run.world, run.world)
    return plan_memory(job, None, "cuda" if machine.is_cuda else "cpu").peak


def _peak_teraflops(machine: Machine) -> float:
    """TFLOP/s of a large bfloat16 product."""
    side = 256 if machine.is_tiny else 8192
    left = torch.randn(side, side, dtype=torch.bfloat16, device=machine.device)
    return 2 * side**3 / machine.milliseconds(lambda: left @ left, 20) / 1e9
