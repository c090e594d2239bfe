"""RoutingTable for tests and benchmarks: what the diffusion prior asks for, and what gates learn when trained on it alone."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from sdit.expert_parallel.placement import ExpertPlacement, ranks_needed
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.model.windows import task_windows

TASKS, ALPHA = 1000, 4.0
STEPS_PER_MATCH = 5  # the matching drifts slowly, and solving it in every step takes half of the time


def prior_routes(depth: int, count: int, top_k: int) -> RoutingTable:
    """RoutingTable exactly as the prior's windows ask for; column c of its mask is expert c // depth of block c % depth."""
    mask = task_windows(TASKS, depth * count, depth * top_k, ALPHA).mask
    by_block = mask.reshape(TASKS, count, depth).transpose(2, 0, 1)
    experts = np.argsort(~by_block, axis=2, kind="stable")[:, :, :top_k]
    return RoutingTable(experts, np.full(experts.shape, 1 / top_k, dtype=np.float32), count)


def random_routes(rng: np.random.Generator, depth: int, count: int, top_k: int, tasks: int = TASKS) -> RoutingTable:
    """RoutingTable without any structure, with gates that fall from the first choice to the last."""
    experts = np.argsort(rng.random((depth, tasks, count)), axis=2)[:, :, :top_k]
    gates = np.sort(rng.random((depth, tasks, top_k)), axis=2)[:, :, ::-1].astype(np.float32)
    return RoutingTable(experts, gates, count)


def learned_routes(depth: int, count: int, top_k: int, steps: int = 600, width: int = 384) -> RoutingTable:
    """RoutingTable of a timestep MLP and one gate per block after `steps` of AdamW on the prior loss alone."""
    generator = torch.Generator().manual_seed(0)
    gates = _GateStack(depth, count, width, generator)
    mask = torch.from_numpy(task_windows(TASKS, depth * count, depth * top_k, ALPHA).mask).float()
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3, weight_decay=0.0)
    target = mask
    for step in range(steps):
        if step % STEPS_PER_MATCH == 0:
            target = _matched(gates.all_tasks(), mask, top_k) / (depth * top_k)
        task = torch.randint(0, TASKS, (128,), generator=generator)
        loss = _divergence(gates(task).flatten(1) / depth, target[task])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = gates.all_tasks().transpose(0, 1).topk(top_k)
    return RoutingTable(chosen.indices.numpy(), chosen.values.numpy(), count)


def shared_learned_routes(factory: pytest.TempPathFactory) -> RoutingTable:
    """Depth 12, M 16, k 2, the width of S/2: gates after 600 steps on the prior, trained once for all test workers."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "learned.npz"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            routes = learned_routes(12, 16, 2, steps=600, width=384)
            np.savez(path, experts=routes.experts, gates=routes.gates)
        with np.load(path) as stored:
            return RoutingTable(stored["experts"], stored["gates"], 16)


class _GateStack(nn.Module):
    def __init__(self, depth: int, count: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = (depth, count)
        self.first, self.second = nn.Linear(256, width), nn.Linear(width, width)
        self.gate = nn.Linear(width, depth * count)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=0.02, generator=generator)
            nn.init.zeros_(linear.bias)
        for block in self.gate.weight.detach().chunk(depth):
            nn.init.xavier_uniform_(block, generator=generator)
        nn.init.zeros_(self.gate.bias)

    def forward(self, task: Tensor) -> Tensor:
        """(B, depth, M) gate probabilities."""
        angle = task[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        embedding = self.second(F.silu(self.first(torch.cat([angle.cos(), angle.sin()], dim=1))))
        return self.gate(F.silu(embedding)).unflatten(1, self.shape).softmax(-1)

    @torch.no_grad()
    def all_tasks(self) -> Tensor:
        return self(torch.arange(TASKS))


def _matched(probs: Tensor, mask: Tensor, top_k: int) -> Tensor:
    """The mask (T, depth * M) with the columns that fit the gates' present top-k best."""
    used = torch.zeros_like(probs).scatter(2, probs.topk(top_k).indices, 1).flatten(1)
    cost = used.sum(0)[:, None] + mask.sum(0)[None] - 2 * used.T @ mask
    return mask[:, torch.from_numpy(linear_sum_assignment(cost.numpy())[1])]


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, mean over rows."""
    log_mean = torch.log((p + q) / 2 + 1e-6)
    return (p * (torch.log(p + 1e-6) - log_mean) + q * (torch.log(q + 1e-6) - log_mean)).sum(1).mean() / 2


def group_transfers(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """(depth,) samples of a group that are sent in each block, counted once per destination.

    `experts` and `kept` are (depth, n, k), the samples in the order of their ranks.
    """
    needed = ranks_needed(experts, placement, kept)
    depth, samples, ranks = needed.shape
    stays = needed.reshape(depth, ranks, samples // ranks, ranks)[:, np.arange(ranks), :, np.arange(ranks)]
    return needed.sum(axis=(1, 2)) - stays.sum(axis=(0, 2))
