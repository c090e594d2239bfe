"""Faults on purpose: `kind@rank:step` makes a rank misbehave in the step after `step` steps were taken.

Imported by the parents of ranks, so without torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sdit.distributed.engine import Engine

EXIT_CODE = 3  # no exit code of sdit
HOLD_SECONDS = 600
SLOW_SECONDS = 0.2
SPIKE_FACTOR = 20.0


@dataclass(frozen=True)
class Fault:
    """One fault. It strikes once, in the run's first attempt; with `!` at its end, whenever the step is tried."""

    kind: str
    rank: int
    step: int
    again: bool

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises: ValueError, which says what is legal."""
        match = re.fullmatch(r"(\w+)@(\d+):(\d+)(!?)", text)
        if not match or match[1] not in KINDS:
            raise ValueError(f"{text!r}; legal: kind@rank:step with kind one of {', '.join(KINDS)}")
        return cls(match[1], int(match[2]), int(match[3]), bool(match[4]))


class FaultyEngine:
    """An engine in which the faults of its rank strike. All other calls reach the real engine."""

    def __init__(self, engine: Engine, faults: Sequence[Fault], attempt: int) -> None:
        self._engine, self._steps = engine, 0
        self._faults = [f for f in faults if f.rank == engine.comm.rank and (f.again or attempt == 1)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_steps(self, steps: int) -> None:
        """Continue after `steps` steps, as after the load of a checkpoint."""
        self._steps = steps
        self._engine.set_steps(steps)

    def step(self, scale: float, learning_rates: dict[str, float]) -> None:
        self._engine.step(scale, learning_rates)
        self._steps += 1

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
            self._engine.gradients()[0].view(-1)[0] = float("nan")
        return self._engine.squared_gradient_norm()

    def _due(self, *kinds: str) -> list[Fault]:
        due = [f for f in self._faults if f.kind in kinds and f.step == self._steps]
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
KINDS = (*STRIKES, "nan_loss", "nan_grad", "spike")
