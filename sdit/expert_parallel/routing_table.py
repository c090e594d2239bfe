"""What the gates of all blocks decide for every task. A step is planned from this copy on the host.

T tasks, N samples, M experts, k experts used per task and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sdit.model import DiffusionTransformer


@dataclass(frozen=True)
class RoutingTable:
    """`experts` (depth, T, k) int64 chosen by falling gate, their `gates` (depth, T, k) float32, of `count` = M."""

    experts: np.ndarray
    gates: np.ndarray
    count: int

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.experts.shape[0]

    @property
    def tasks(self) -> int:
        """T, number of tasks."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """k, experts used per task and block."""
        return self.experts.shape[2]


def routing_table(model: DiffusionTransformer) -> RoutingTable:
    """The routing table at the model's present weights; one copy from the device."""
    import torch  # the rest of this module is arithmetic of integers, and is used where torch is not

    top = model.all_gate_probs().topk(model.config.experts.top_k)
    host = torch.stack([top.indices.float(), top.values]).cpu().numpy()  # ids < 2^24 are exact in float32
    return RoutingTable(host[0].astype(np.int64), host[1], model.config.experts.count)


def exact_loads(experts: np.ndarray, count: int) -> np.ndarray:
    """(depth, M) share of the T tasks whose top-k (depth, T, k) holds the expert; each row sums to k.

    It is the expected share of samples, exactly, because t is uniform over the tasks.
    """
    return expert_counts(experts, count) / experts.shape[1]


def expert_counts(experts: np.ndarray, count: int, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth, M) int64: rows of `experts` (depth, N, k) that each expert serves; those not `kept` do not count."""
    depth = len(experts)
    flat = experts + np.arange(depth)[:, None, None] * count
    flat = flat.ravel() if kept is None else flat[kept]
    return np.bincount(flat, minlength=depth * count).reshape(depth, count)


def load_max_over_mean(work: np.ndarray) -> np.ndarray:
    """(depth,) largest over mean of each block's `work` (depth, P): 1 is balanced, 0 means no work at all."""
    mean = work.mean(axis=1)
    return work.max(axis=1) / np.where(mean > 0, mean, 1)


def hottest(loads: np.ndarray, number: int) -> np.ndarray:
    """(depth, M) bool, true for each block's `number` experts of highest load (depth, M); ties go to lower ids."""
    order = np.argsort(-loads, axis=1, kind="stable")[:, :number]
    hot = np.zeros(loads.shape, dtype=bool)
    np.put_along_axis(hot, order, True, axis=1)
    return hot
