"""The diffusion prior of Switch-DiT: similar tasks are trained to share experts, distant tasks to use different ones.

B samples, T tasks, M experts of a block, k experts used per block. A unit is one expert of one block. There are
depth * M units, in block order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.contracts import Routing
from sdit.model.dit import DiffusionTransformer
from sdit.model.windows import TaskWindows, expert_windows
from sdit.time_law import TimeLaw
from sdit.transfers import upload

EPSILON = 1e-6
# Up to this number of units scipy solves the whole problem in about 10 ms. Above it, the reduced problem is faster.
FULL_UNITS = 256


class PriorTensors(NamedTuple):
    """An assignment on a device: the column of each unit (units,) and the first column of each task's window (T,)."""

    columns: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Assignment:
    """The column of the prior's mask that each unit is matched with: `columns` (depth * M,) int64, a permutation."""

    columns: np.ndarray
    windows: TaskWindows
    _on_device: dict[torch.device, PriorTensors] = field(default_factory=dict, repr=False, compare=False)

    def tensors(self, device: torch.device) -> PriorTensors:
        """Return the assignment on the device. It is copied there once."""
        if device not in self._on_device:
            packed = torch.from_numpy(np.concatenate([self.columns, self.windows.starts]))
            columns, starts = upload(packed, device).split([len(self.columns), len(self.windows.starts)])
            self._on_device[device] = PriorTensors(columns, starts)
        return self._on_device[device]


class UnitMatcher:
    """Matches units with columns of the prior's mask, and solves the problem again only if a chosen set changed.

    The solution is a function of the chosen sets only: also between equally good solutions, the choice does not depend on
    earlier steps. `law` is that of `expert_windows`.
    """

    def __init__(self, config: ModelConfig, law: TimeLaw | None = None) -> None:
        self.windows = expert_windows(config, law)
        self._count = config.experts.count
        self._tasks_of_columns = self.windows.tasks_of_units
        self._experts = np.empty((0, 0, 0), dtype=np.int64)
        self._solved: Assignment | None = None
        self.solutions = 0

    def match(self, experts: np.ndarray) -> Assignment:
        """Return the matching for the chosen experts (depth, T, k). The same sets give the same object.

        The order of the k experts of a task has no effect.
        """
        if self._solved is None or self._has_changed(experts):
            self._solved = self._solve(experts)
            self.solutions += 1
        self._experts = experts
        return self._solved

    def _has_changed(self, experts: np.ndarray) -> bool:
        """Return True if any set differs from the last one. Only experts that differ are sorted, which takes the time."""
        top_k = experts.shape[2]
        sets = np.flatnonzero(experts != self._experts) // top_k
        present, last = (np.sort(each.reshape(-1, top_k)[sets], axis=1) for each in (experts, self._experts))
        return not np.array_equal(present, last)

    def _solve(self, experts: np.ndarray) -> Assignment:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # slow to import

        users = self._users(experts)
        if self.windows.units <= FULL_UNITS:
            return Assignment(linear_sum_assignment(self._cost(users))[1], self.windows)
        used, overlap = self._overlap(users)
        columns = np.full(self.windows.units, -1)
        columns[used] = linear_sum_assignment(overlap, maximize=True)[1]
        columns[columns < 0] = np.setdiff1d(np.arange(len(columns)), columns)
        return Assignment(columns, self.windows)

    def _users(self, experts: np.ndarray) -> np.ndarray:
        """Return (units, T + 1) float32, for each unit the number of its users among the first 0 to T tasks.

        All numbers in this class are integers below 2^24, which float32 holds exactly.
        """
        depth, tasks, _ = experts.shape
        used = np.zeros((depth, self._count, tasks), dtype=np.float32)
        np.put_along_axis(used, experts.transpose(0, 2, 1), 1.0, axis=1)
        users = np.zeros((depth * self._count, tasks + 1), dtype=np.float32)
        np.cumsum(used.reshape(-1, tasks), axis=1, out=users[:, 1:])
        return users

    def _cost(self, users: np.ndarray) -> np.ndarray:
        """Return sum_t |A[t, a] - B[t, b]|, (units, units) float32, for units a and columns b.

        Each column is marked for a range of tasks, so the products A^T B are differences of prefix sums over the tasks.
        """
        first, stop = self._tasks_of_columns
        cost = users.take(first, axis=1)  # |a - b| = a + b - 2ab for binary a and b
        cost -= users.take(stop, axis=1)
        cost *= 2
        cost += users[:, -1:]
        cost += (stop - first).astype(np.float32)
        return cost

    def _overlap(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the units that some task uses, and A^T B of them, (used units, units) float32.

        In a sum of costs over a permutation only A^T B depends on the permutation. An unused unit has no overlap, so it takes
        any column that is left. The units with the largest overlap come first: the solver then takes half the time or less.
        """
        first, stop = self._tasks_of_columns
        used = np.flatnonzero(users[:, -1])
        overlap = users[used].take(stop, axis=1)
        overlap -= users[used].take(first, axis=1)
        order = np.argsort(-overlap.max(axis=1), kind="stable")
        return used[order], overlap[order]


def solve_assignment(gate_probs: Tensor, config: ModelConfig, law: TimeLaw | None = None) -> Assignment:
    """Return the matching of units to mask columns that minimises `sum_t |A[t, a] - B[t, pi(a)]|` over all T tasks.

    gate_probs: (depth, T, M) of all tasks, which have equal weight. A marks the top-k experts, B is the prior's mask. No
    gradient. `law` is that of `expert_windows`.
    """
    return UnitMatcher(config, law).match(gate_probs.detach().topk(config.experts.top_k).indices.cpu().numpy())


def prior_divergence(routing: Routing, assignment: Assignment) -> Tensor:
    """Return the Jensen-Shannon divergence (B,) in nats between each sample's gate probabilities and its matched prior."""
    depth, batch, _ = routing.gate_probs.shape
    p = routing.gate_probs.transpose(0, 1).reshape(batch, -1) / depth
    # The prior: 1 / (k depth) for units whose column is in the task's window, else 0.
    active, (columns, starts) = assignment.windows.active, assignment.tensors(routing.task.device)
    start = starts[routing.task][:, None]
    q = ((columns >= start) & (columns < start + active)).float() / active
    log_mean = torch.log((p + q) / 2 + EPSILON)
    divergence = p * (torch.log(p + EPSILON) - log_mean) + q * (torch.log(q + EPSILON) - log_mean)
    return divergence.sum(-1) / 2


def prior_loss(model: DiffusionTransformer, t: Tensor) -> Tensor:
    """Return the scalar mean of the divergence over times t (B,). It is 0 for a model without gates.

    The units are matched with the model's current gates.
    """
    task = model.gate_task(t)
    probs = model.gate_probs(task)
    if not len(probs):
        return probs.new_zeros(())
    experts = probs.detach().topk(model.config.experts.top_k).indices
    assignment = solve_assignment(model.all_gate_probs(), model.config)
    return prior_divergence(Routing(task, probs, experts), assignment).mean()
