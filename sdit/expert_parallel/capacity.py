"""Which samples an expert with limited capacity serves: a function of the global batch, for any layout.

N samples of the global batch, T tasks, M experts, k experts used per sample and block.
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
    """`factor` over the mean load, and which samples stay: highest gate, lowest index, or a random choice by `seed`."""

    factor: float
    policy: Literal["gate", "position", "random"] = "gate"
    seed: int = 0


def capacity_limit(factor: float, samples: int, top_k: int, experts: int) -> int:
    """ceil(factor * N * k / M), the samples of the global batch that one expert takes."""
    # In floats 1.1 * 110 is 121.00000000000001, one sample more than asked for: compute with the decimal as written.
    return math.ceil(Fraction(repr(factor)) * samples * top_k / experts)


def keep_samples(routes: RoutingTable, tasks: np.ndarray, first_index: int, capacity: Capacity) -> np.ndarray:
    """(depth, N, k) bool, false where an overfull expert drops the sample, for the global batch's tasks (N,).

    `first_index` is the run index of the batch's first sample. Equal gates are kept by rising index.
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
    order = np.lexsort((priority, unit))  # stable: entries of equal priority stay in the order of their samples
    starts = np.searchsorted(unit[order], unit[order])
    dropped = order[np.arange(len(order)) - starts >= limit]
    kept[block[dropped], sample[dropped], choice[dropped]] = False
    return kept


def dropped_per_block(kept: np.ndarray) -> np.ndarray:
    """(depth,) int64: the (sample, expert) pairs of `kept` (depth, N, k) that no expert serves."""
    return (~kept).sum(axis=(1, 2))


def _priority(
    routes: RoutingTable, tasks: np.ndarray, first_index: int, capacity: Capacity, entry: tuple[np.ndarray, ...]
) -> np.ndarray:
    """One number per (block, sample, choice, expert) entry; the lowest stay."""
    block, sample, choice, expert = entry
    if capacity.policy == "gate":
        return -routes.gates[block, tasks[sample], choice]
    if capacity.policy == "position":
        return sample
    return priorities(capacity.seed, first_index + sample, block, expert)
