"""Where the device's time goes in a training step: the share in which it computes, and the kernels that take longest."""

from __future__ import annotations

import torch
from rows import Machine, Row
from small_run import comm_of_one, model_keys, open_run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_steps import training_step

STEPS, SHOWN = 3, 12


def measure(machine: Machine) -> list[Row]:
    """The rows of S/2 and XL/2, with the defaults of a GPU."""
    rows = []
    with comm_of_one(machine) as comm:
        for size, batch in (("tiny", 8),) if machine.is_tiny else (("S/2", 256), ("XL/2", 32)):
            keys = {
                "model": model_keys(machine, size),
                "train": {"steps": 1000, "global_batch": batch, "precision": "bf16"},
            }
            with open_run(machine, comm, keys) as (trainer, _):
                step = training_step(trainer)
                for _ in range(1 if machine.is_tiny else 4):
                    step()
                plain = machine.milliseconds(step, STEPS)
                activities = [ProfilerActivity.CUDA if machine.is_cuda else ProfilerActivity.CPU]
                with profile(activities=activities) as profiler:
                    for _ in range(STEPS):
                        step()
                    machine.settle()
            rows += kernel_rows(f"{size}, {batch} images", profiler, plain, machine)
    return rows


def kernel_rows(name: str, profiler: profile, plain: float, machine: Machine) -> list[Row]:
    """The kernels of a profile. `plain` is the time in ms of a step that is not profiled."""
    wanted = DeviceType.CUDA if machine.is_cuda else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]

    def milliseconds(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        spent = event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total
        return spent / 1e3 / STEPS

    events.sort(key=milliseconds, reverse=True)
    busy = sum(map(milliseconds, events))
    return [
        Row(f"{name}: kernels", sum(event.count for event in events) / STEPS, "per step"),
        Row(f"{name}: device computes", 100 * busy / plain, "% of the step"),
        *(
            Row(f"{name}: {event.key[:80]}", milliseconds(event), f"ms per step, {event.count / STEPS:.0f} times")
            for event in events[:SHOWN]
        ),
    ]
