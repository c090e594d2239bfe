"""The decisions of all gates for all tasks, on the host. A step is planned from this table.

T tasks, N samples, M experts of a block, k experts used per task and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sdit.model import DiffusionTransformer


@dataclass(frozen=True)
class RoutingTable:
    """The chosen experts of each task and their gates.

    `experts` (depth, T, k) int64 in descending order of their `gates` (depth, T, k) float32. `count` = M.
    """

    experts: np.ndarray
    gates: np.ndarray
    count: int

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.experts.shape[0]

    @property
    def tasks(self) -> int:
        """The number of tasks T."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """The number k of experts used per task and block."""
        return self.experts.shape[2]


class PendingTable:
    """The routing table of the model's current weights. Its copy from the device has begun, and `wait` returns it."""

    def __init__(self, model: DiffusionTransformer) -> None:
        import torch  # the functions are also used in processes that must not import torch

        from sdit.transfers import Download

        top = model.all_gate_probs().topk(model.config.experts.top_k)
        self._count = model.config.experts.count
        self._copy = Download(torch.stack([top.indices.float(), top.values]))  # ids < 2^24 are exact in float32

    def wait(self) -> RoutingTable:
        """Return the table. The host waits for the copy."""
        host = self._copy.wait().numpy()
        return RoutingTable(host[0].astype(np.int64), host[1], self._count)


def exact_loads(experts: np.ndarray, count: int) -> np.ndarray:
    """Return (depth, M), the fraction of the T tasks that use the expert, for `experts` (depth, T, k). A row sums to k.

    It is the exact expected fraction of samples, because t is uniform over the tasks.
    """
    return expert_counts(experts, count) / experts.shape[1]


def expert_counts(experts: np.ndarray, count: int, kept: np.ndarray | None = None) -> np.ndarray:
    """Return (depth, M) int64, the rows of `experts` (depth, N, k) that each expert serves. Only `kept` rows are counted."""
    depth = len(experts)
    flat = experts + np.arange(depth)[:, None, None] * count
    flat = flat.ravel() if kept is None else flat[kept]
    return np.bincount(flat, minlength=depth * count).reshape(depth, count)


def load_max_over_mean(work: np.ndarray) -> np.ndarray:
    """Return (depth,), the max / mean of each block's `work` (depth, P). 1 is balanced, 0 means no work."""
    mean = work.mean(axis=1)
    return work.max(axis=1) / np.where(mean > 0, mean, 1)


def hottest(loads: np.ndarray, number: int) -> np.ndarray:
    """Return (depth, M) bool, True for the `number` experts of each block with the highest load (depth, M), ties by id."""
    order = np.argsort(-loads, axis=1, kind="stable")[:, :number]
    hot = np.zeros(loads.shape, dtype=bool)
    np.put_along_axis(hot, order, True, axis=1)
    return hot
