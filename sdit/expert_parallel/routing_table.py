"""The decisions of all gates for all tasks, on the host. A step is planned from this table.

T tasks, N samples, M experts of a block, k experts used per task and block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdit.config import Config
from sdit.time_law import TimeLaw


@dataclass(frozen=True)
class RoutingTable:
    """The chosen experts of each task and their gates, and how often each task is drawn.

    `experts` (depth, T, k) int64 in descending order of their `gates` (depth, T, k) float32. `count` = M. `task_weights` (T,)
    is T times the probability of each task (`TimeLaw.task_weights`). None: all tasks are drawn equally often.
    """

    experts: np.ndarray
    gates: np.ndarray
    count: int
    task_weights: np.ndarray | None = None

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

    @property
    def weights(self) -> np.ndarray:
        """T times the probability of each task, float64 (T,)."""
        return np.ones(self.tasks) if self.task_weights is None else self.task_weights

    @property
    def loads(self) -> np.ndarray:
        """The expected fraction of samples that use each expert, (depth, M). A row sums to k."""
        return exact_loads(self.experts, self.count, self.task_weights)

    def tasks_at(self, position: np.ndarray) -> np.ndarray:
        """Return the task int64 at each `position` in [0, T), where every task takes as much space as its weight."""
        return np.minimum(np.searchsorted(np.cumsum(self.weights), position, side="right"), self.tasks - 1)

    def random_tasks(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return independent tasks int64 of this shape. If all weights are 1, they are `generator.integers(0, T, shape)`."""
        return self.tasks_at(generator.integers(0, self.tasks, shape) + generator.random(shape))


def task_weights(config: Config) -> np.ndarray:
    """Return T times the probability of each gate task in training, float64 (T,)."""
    return TimeLaw.of(config.diffusion).task_weights(config.model.timesteps)


def exact_loads(experts: np.ndarray, count: int, task_weights: np.ndarray | None = None) -> np.ndarray:
    """Return (depth, M), the exact probability that a sample uses the expert, for `experts` (depth, T, k).

    `task_weights` (T,) are T times the probabilities of the tasks (None: 1). A row sums to k.
    """
    tasks = experts.shape[1]
    return sum_over_users(experts, count, np.ones(tasks) if task_weights is None else task_weights) / tasks


def sum_over_users(experts: np.ndarray, count: int, values: np.ndarray) -> np.ndarray:
    """Return (depth, M) float64, the sum of the `values` (T,) of the tasks that use each expert."""
    depth = len(experts)
    flat = experts + np.arange(depth)[:, None, None] * count
    repeated = np.broadcast_to(values[:, None], experts.shape)
    return np.bincount(flat.ravel(), repeated.ravel(), minlength=depth * count).reshape(depth, count)


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
