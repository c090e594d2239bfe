"""The dispatcher of a process that has all experts."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor, nn

from sdit.contracts import TaskView


class LocalPass:
    """A forward pass in one process. No data are transferred."""

    def __init__(self, view: TaskView) -> None:
        self.view = view

    def dispatch(
        self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: nn.Module
    ) -> tuple[Tensor, Tensor, nn.Module]:
        """Return the tokens z (B, L, D), their gates (B, M) or (1, M), and the experts. No data are sent."""
        return z, gates, experts

    def compute(self, dispatched: tuple[Tensor, Tensor, nn.Module]) -> Tensor:
        """Return the mixture (B, L, D)."""
        z, gates, experts = dispatched
        return experts(z, gates)

    def combine(self, computed: Tensor) -> Tensor:
        """Return the mixture (B, L, D) unchanged."""
        return computed


class LocalDispatcher:
    """The dispatcher of one process."""

    def forward_pass(self, task: Tensor) -> LocalPass:
        """Return a pass over all rows, or over one row if all samples are known to have the same task."""
        if _all_equal(task):
            return LocalPass(TaskView(task[:1], torch.zeros(len(task), dtype=torch.int64, device=task.device)))
        return LocalPass(TaskView(task, slice(None)))


def _all_equal(task: Tensor) -> bool:
    """Return True if all tasks are known to be equal without a GPU synchronisation.

    This is the case for an expanded scalar and for equal values in host memory.
    """
    if len(task) == 1 or task.stride(0) == 0:
        return True
    return task.device.type == "cpu" and not torch.is_grad_enabled() and bool((task == task[0]).all())
