"""The places where the host waits for the device in a training step, and copies that stop it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rows import Machine, Row, limited
from small_run import comm_of_one, model_keys, open_run
from train_steps import training_step

from sdit.distributed.comm import Comm
from sdit.transfers import Download

STEPS = 3
WAITS_PER_STEP = 2  # the sums, and behind the forward pass the gates


def measure(machine: Machine) -> list[Row]:
    """The rows of a Switch-DiT, and of a DiT with token-routed experts, whose rows the device counts itself."""
    switch = model_keys(machine, "S/2")
    token_routed = {**switch, "variant": "dit", "moe": {"experts": 4, "balance": "aux"}}
    with comm_of_one(machine) as comm:
        return [
            *waits_of(machine, comm, "a step", switch, WAITS_PER_STEP),
            *waits_of(machine, comm, "a step with token-routed experts", token_routed, 1),
        ]


def waits_of(machine: Machine, comm: Comm, name: str, model: Mapping[str, Any], limit: int) -> list[Row]:
    """Waits per step on purpose, of which there may be `limit`, and each line that torch reports as a wait."""
    batch = 8 if machine.is_tiny else 32
    keys = {"model": model, "train": {"steps": 1000, "global_batch": batch, "precision": "bf16"}}
    with open_run(machine, comm, keys) as (trainer, _):
        step = training_step(trainer)
        for _ in range(2):
            step()
        with (
            patch.object(Download, "wait", autospec=True, side_effect=Download.wait) as waits,
            reported_waits(machine) as lines,
        ):
            for _ in range(STEPS):
                step()
    rows = [limited(f"waits of {name} on purpose (transfers.Download)", waits.call_count / STEPS, "", limit)]
    others = {line: count for line, count in lines.items() if not line.startswith("sdit/transfers.py")}
    rows.append(limited(f"other waits of {name}, by torch's report", sum(others.values()) / STEPS, "", 0))
    return rows + [Row(f"waits of {name} at {line}", count / STEPS, "per step") for line, count in others.items()]


@contextmanager
def reported_waits(machine: Machine) -> Iterator[Counter[str]]:
    """Count the lines at which torch reports that an operation waits for the GPU."""
    lines: Counter[str] = Counter()
    if not machine.is_cuda:
        yield lines
        return
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines.update(_place(each) for each in found if "synchronizing CUDA operation" in str(each.message))


def _place(warning: Any) -> str:
    parts = Path(warning.filename).parts
    start = max((parts.index(name) for name in ("sdit", "deepspeed", "torch") if name in parts), default=0)
    return f"{'/'.join(parts[start:])}:{warning.lineno}"
