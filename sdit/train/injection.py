"""Lets injected faults strike a rank: a wrapper around its engine that only tests ask for."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sdit.distributed.engine import Engine
from sdit.supervise.fault import Fault

EXIT_CODE = 3  # a code of nobody's
HOLD_SECONDS = 600
SLOW_SECONDS = 0.2
SPIKE_FACTOR = 20.0


class FaultyEngine:
    """An engine that lets faults strike; everything else goes through to the real one."""

    def __init__(self, engine: Engine, faults: Sequence[Fault], attempt: int, steps: Callable[[], int]) -> None:
        self._engine, self._steps = engine, steps
        self._faults = [f for f in faults if f.rank == engine.comm.rank and (f.again or attempt == 1)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, *inputs: Any) -> Any:
        for fault in self._due(*STRIKES):
            STRIKES[fault.kind]()
        losses = self._engine.forward(*inputs)
        if self._due("nan_loss"):
            losses = losses._replace(total=losses.total * float("nan"), parts=losses.parts * float("nan"))
        if self._due("spike"):
            losses = losses._replace(parts=losses.parts * SPIKE_FACTOR)
        return losses

    def squared_gradient_norm(self) -> Tensor:
        if self._due("nan_grad"):
            self._engine.gradients()[0][0].view(-1)[0] = float("nan")
        return self._engine.squared_gradient_norm()

    def _due(self, *kinds: str) -> list[Fault]:
        due = [f for f in self._faults if f.kind in kinds and f.step == self._steps()]
        self._faults = [f for f in self._faults if f not in due or f.again]
        return due


def _stop() -> None:
    while True:  # a request for its stacks wakes it
        os.kill(os.getpid(), signal.SIGSTOP)


def _hold_interpreter_lock() -> None:
    while True:
        ctypes.PyDLL(None).sleep(HOLD_SECONDS)


def _raise() -> None:
    raise RuntimeError("a fault was injected")


def _run_out_of_memory() -> None:
    raise MemoryError("a fault was injected: out of memory")


STRIKES: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": _stop,
    "gil": _hold_interpreter_lock,
    "exit": lambda: os._exit(EXIT_CODE),
    "exception": _raise,
    "oom": _run_out_of_memory,
    "slow": lambda: time.sleep(SLOW_SECONDS),
    "hang": lambda: time.sleep(HOLD_SECONDS),
}
