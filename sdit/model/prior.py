"""The diffusion prior of Switch-DiT: similar tasks are trained to share experts, distant tasks to use different ones.

B samples, T tasks, M experts of a block, k experts used per block. A unit is one expert of one block. There are
depth * M units, in block order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.contracts import Routing
from sdit.model.dit import DiffusionTransformer
from sdit.model.windows import TaskWindows, expert_windows

EPSILON = 1e-6


@dataclass(frozen=True)
class Assignment:
    """The column of the prior's mask that each unit is matched with: `columns` (depth * M,) int64, a permutation."""

    columns: np.ndarray
    windows: TaskWindows


def solve_assignment(gate_probs: Tensor, config: ModelConfig) -> Assignment:
    """Return the matching of units to mask columns that minimises `sum_t |A[t, a] - B[t, pi(a)]|` over all T tasks.

    gate_probs: (depth, T, M) of all tasks. A marks the top-k experts, B is the prior's mask. No gradient.
    """
    return match_units(gate_probs.detach().topk(config.experts.top_k).indices.cpu().numpy(), config)


def match_units(experts: np.ndarray, config: ModelConfig) -> Assignment:
    """Return the same matching as `solve_assignment`, given the chosen experts (depth, T, k) in host memory."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # slow to import: not for sampling

    windows = expert_windows(config)
    depth, tasks, _ = experts.shape
    used = np.zeros((depth, tasks, config.experts.count), dtype=np.float32)
    np.put_along_axis(used, experts, 1.0, axis=2)
    a = used.transpose(1, 0, 2).reshape(tasks, -1)  # (T, units)
    b = windows.mask.astype(np.float32)
    # |a - b| = a + b - 2ab for binary a and b. This avoids a (T, units, units) tensor.
    cost = a.sum(0)[:, None] + b.sum(0)[None, :] - 2 * (a.T @ b)
    return Assignment(linear_sum_assignment(cost)[1], windows)


def prior_divergence(routing: Routing, assignment: Assignment) -> Tensor:
    """Return the Jensen-Shannon divergence (B,) in nats between each sample's gate probabilities and its matched prior."""
    depth, batch, _ = routing.gate_probs.shape
    p = routing.gate_probs.transpose(0, 1).reshape(batch, -1) / depth
    q = _matched_prior(routing.task, assignment)
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


def _matched_prior(task: Tensor, assignment: Assignment) -> Tensor:
    """Return (B, units) float32: 1 / (k depth) for units whose column is in the task's window, else 0."""
    windows = assignment.windows
    column = torch.from_numpy(assignment.columns).to(task.device)
    start = torch.from_numpy(windows.starts).to(task.device)[task][:, None]
    return ((column >= start) & (column < start + windows.active)).float() / windows.active
