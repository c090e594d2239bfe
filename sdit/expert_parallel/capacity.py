"""Selects the samples that an expert with limited capacity serves: a function of the global batch, for any layout.

N samples of the global batch, T tasks, M experts of a block, k experts used per sample and block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from sdit.expert_parallel.routing_table import RoutingTable, expert_counts
from sdit.randomness import priorities


@dataclass(frozen=True)
class Capacity:
    """A capacity `factor` relative to the mean load, and the rule for the samples that are kept.

    The rule is highest gate, lowest index, or a random choice by `seed`.
    """

    factor: float
    policy: Literal["gate", "position", "random"] = "gate"
    seed: int = 0


def capacity_limit(factor: float, samples: int, top_k: int, experts: int) -> int:
    """Return ceil(factor * N * k / M), the number of samples of the global batch that one expert serves."""
    # In floats 1.1 * 110 is 121.00000000000001, which would give one more sample. Compute with the exact decimal.
    return math.ceil(Fraction(repr(factor)) * samples * top_k / experts)


def keep_samples(routes: RoutingTable, tasks: np.ndarray, first_index: int, capacity: Capacity) -> np.ndarray:
    """Return (depth, N, k) bool, False where an overfull expert drops the sample, for tasks (N,) of the global batch.

    `first_index` is the run index of the first sample of the batch. Samples with equal gates are kept in index order.
    """
    experts = routes.experts[:, tasks]
    limit = capacity_limit(capacity.factor, len(tasks), routes.top_k, routes.count)
    overfull = expert_counts(experts, routes.count) > limit
    block, sample, choice = np.nonzero(np.take_along_axis(overfull[:, None, :], experts, axis=2))
    kept = np.ones(experts.shape, dtype=bool)
    if not len(block):
        return kept
    expert = experts[block, sample, choice]
    unit = block * routes.count + expert
    priority = _priority(routes, tasks, first_index, capacity, (block, sample, choice, expert))
    order = np.lexsort((priority, unit))  # stable, so entries of equal priority stay in sample order
    starts = np.searchsorted(unit[order], unit[order])
    dropped = order[np.arange(len(order)) - starts >= limit]
    kept[block[dropped], sample[dropped], choice[dropped]] = False
    return kept


def dropped_per_block(kept: np.ndarray) -> np.ndarray:
    """Return (depth,) int64, the number of dropped (sample, expert) pairs of `kept` (depth, N, k) in each block."""
    return (~kept).sum(axis=(1, 2))


def _priority(
    routes: RoutingTable, tasks: np.ndarray, first_index: int, capacity: Capacity, entry: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Return one number per (block, sample, choice, expert) entry. The lowest numbers are kept."""
    block, sample, choice, expert = entry
    if capacity.policy == "gate":
        return -routes.gates[block, tasks[sample], choice]
    if capacity.policy == "position":
        return sample
    return priorities(capacity.seed, first_index + sample, block, expert)
