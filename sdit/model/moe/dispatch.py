"""Where samples meet experts when all experts are at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdit.contracts import TaskView


@dataclass(frozen=True)
class Ready:
    """A mixture that waits for nothing."""

    mixed: Tensor

    def serve(self) -> None:
        """Nobody sent anything."""

    def wait(self) -> Tensor:
        return self.mixed


class LocalDispatcher:
    """The dispatcher of one process: every sample is mixed by the experts in its own memory."""

    def view(self, task: Tensor) -> TaskView:
        """All rows, or a single row for the whole batch where every sample is known to have the same task."""
        if _all_equal(task):
            return TaskView(task=task[:1], own=torch.zeros(len(task), dtype=torch.int64, device=task.device))
        return TaskView(task=task, own=slice(None))

    def start(self, block: int, z: Tensor, gates: Tensor, experts: nn.Module, part: int = 0) -> Ready:
        """The mixture, with nothing to wait for."""
        return Ready(self.mix(block, z, gates, experts))

    def mix(self, block: int, z: Tensor, gates: Tensor, experts: nn.Module) -> Tensor:
        """m_i(z, t) (B, L, D) for tokens z (B, L, D) and gates (B, M), or (1, M) for all samples."""
        return experts(z, gates)


def _all_equal(task: Tensor) -> bool:
    """True where equality is known without waiting for a GPU: an expanded scalar, or values in host memory."""
    if len(task) == 1 or task.stride(0) == 0:
        return True
    return task.device.type == "cpu" and not torch.is_grad_enabled() and bool((task == task[0]).all())
