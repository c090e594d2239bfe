"""Where tokens meet experts when one process holds all experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdit.contracts import TaskView


class LocalWork(NamedTuple):
    """Tokens z (B, L, D), gates (B, M) or (1, M), and the experts of a block."""

    z: Tensor
    gates: Tensor
    experts: nn.Module


class LocalPass:
    """A forward pass of one process: nothing travels."""

    def __init__(self, view: TaskView) -> None:
        self.view = view

    def dispatch(self, block: int, z: Tensor, gates: Tensor, experts: nn.Module) -> LocalWork:
        """Keep the tokens z (B, L, D) and their gates: nothing is sent."""
        return LocalWork(z, gates, experts)

    def compute(self, dispatched: LocalWork) -> Tensor:
        """Return the mixture (B, L, D)."""
        mixed: Tensor = dispatched.experts(dispatched.z, dispatched.gates)
        return mixed

    def combine(self, computed: Tensor) -> Tensor:
        """Return the mixture (B, L, D) unchanged."""
        return computed


class LocalDispatcher:
    """The dispatcher of one process."""

    def forward_pass(self, task: Tensor) -> LocalPass:
        """Return a pass over all rows, or over one row for the batch if every sample is known to have the same task."""
        if _all_equal(task):
            return LocalPass(TaskView(task[:1], torch.zeros(len(task), dtype=torch.int64, device=task.device)))
        return LocalPass(TaskView(task, slice(None)))


def _all_equal(task: Tensor) -> bool:
    """True where equality is known without waiting for a GPU: an expanded scalar, or values in host memory."""
    if len(task) == 1 or task.stride(0) == 0:
        return True
    return task.device.type == "cpu" and not torch.is_grad_enabled() and bool((task == task[0]).all())
