"""Ranks, expert groups and batch sizes as pure integers. M experts of a block, EP ranks per expert group, W ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdit.errors import ConfigError


@dataclass(frozen=True)
class ExpertGroups:
    """DeepSpeed's expert groups of W ranks. W is a multiple of EP.

    A group of EP consecutive ranks shares the experts. Ranks with the same EP rank own the same experts.
    """

    world: int
    size: int

    def __post_init__(self) -> None:
        assert self.size >= 1 and self.world % self.size == 0, self

    @property
    def count(self) -> int:
        """The number of expert-parallel groups. It is EDP, the number of copies of each expert."""
        return self.world // self.size

    def group_of(self, rank: int) -> int:
        """Return the expert-parallel group of a rank."""
        return rank // self.size

    def ep_rank_of(self, rank: int) -> int:
        """Return the rank's index in its group, 0 .. EP - 1."""
        return rank % self.size

    def parallel_ranks(self, rank: int) -> range:
        """Return the ranks of this rank's group. They exchange samples and expert weights."""
        start = self.group_of(rank) * self.size
        return range(start, start + self.size)

    def data_ranks(self, rank: int) -> range:
        """Return the ranks with the same experts as this one. Expert gradients are summed over them."""
        return range(self.ep_rank_of(rank), self.world, self.size)


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def legal_expert_sizes(experts: int, world: int) -> list[int]:
    """Return each EP that divides both M experts and W ranks, ascending."""
    return divisors(math.gcd(experts, world))


def common_ranks_per_node(local_worlds: Sequence[int]) -> int:
    """Return the largest size of groups of consecutive ranks that are each within one node.

    `local_worlds` has for each rank the number of ranks of its node. Nodes may differ.
    """
    return math.gcd(*local_worlds)


def choose_expert_parallel(setting: int | Literal["auto"], experts: int, world: int, ranks_per_node: int) -> int:
    """Return EP for `parallel.expert`. auto is the largest legal size whose groups are each within one node.

    `ranks_per_node` is that of `common_ranks_per_node`.

    Raises: ConfigError: if the size does not divide both the experts and the ranks.
    """
    legal = legal_expert_sizes(experts, world)
    if setting == "auto":
        # Groups of consecutive ranks are each within one node if and only if their size divides the node's.
        return max(size for size in legal if ranks_per_node % size == 0)
    if setting not in legal:
        divided = f"{experts} experts and {world} ranks"
        raise ConfigError(f"parallel.expert: {setting} must divide {divided}; legal: {_listed(legal)}")
    return setting


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch` images per step = W ranks x `micro_batch` images per pass x `accumulation` micro-steps."""

    global_batch: int
    micro_batch: int
    accumulation: int

    @property
    def chunk(self) -> int:
        """The images of one micro-step, over all ranks."""
        return self.global_batch // self.accumulation

    @property
    def micro_batches(self) -> int:
        """The micro-batches of one step, over all ranks."""
        return self.global_batch // self.micro_batch


def plan_batch(global_batch: int, micro_batch: int | None, world: int) -> BatchPlan:
    """Return the division of a global batch over W ranks. Without a micro-batch, each rank uses one pass.

    Raises: ConfigError: if the batch cannot be divided equally.
    """
    if global_batch % world:
        below, above = global_batch // world * world, (global_batch // world + 1) * world
        near = _listed([size for size in (below, above) if size])
        raise ConfigError(
            f"train.global_batch: {global_batch} is not a multiple of {world} ranks; nearest legal: {near}"
        )
    per_rank = global_batch // world
    if micro_batch is None:
        return BatchPlan(global_batch, per_rank, 1)
    if micro_batch < 1 or per_rank % micro_batch:
        raise ConfigError(
            f"train.micro_batch: {micro_batch} does not divide the {per_rank} images of a rank "
            f"(global_batch {global_batch} over {world} ranks); legal: {_listed(divisors(per_rank))}"
        )
    return BatchPlan(global_batch, micro_batch, per_rank // micro_batch)


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
