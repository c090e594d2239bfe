#!/usr/bin/env python3
"""`launcher/train.py` on CPUs, with NCCL's habit that a rank which leaves its group waits for the others.

The rank 0 raises a DataError in its first step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sdit.cli.process import run_command
from sdit.cli.train import main as train
from sdit.errors import DataError

if TYPE_CHECKING:
    from sdit.distributed.engine import Engine

WAIT_SECONDS = 600


class FailingEngine:
    """An engine whose forward pass fails on rank 0. All other calls reach the real engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, *inputs: Any) -> Any:
        if self._engine.comm.rank:
            return self._engine.forward(*inputs)
        return _fail()


def _fail() -> NoReturn:
    import torch.distributed as dist

    dist.get_backend = lambda *_: "nccl"
    dist.destroy_process_group = lambda *_: time.sleep(WAIT_SECONDS)
    raise DataError("shard-000003.tar: is not readable")


def main() -> int:
    command = [sys.executable, "-P", __file__, *sys.argv[1:]]
    return train(sys.argv[1:], worker_command=command, wrap_engine=FailingEngine)  # type: ignore[arg-type]


if __name__ == "__main__":
    run_command(main)
