"""The cost of an exchange: unit costs, and the expected bytes or seconds of a placement.

P ranks per group, B samples per rank and micro-step, n = P * B, L tokens, D width, H hidden width, M experts of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.config import ExpertsConfig, ModelConfig, ParallelConfig
from sdit.expert_parallel.assignment import assign_samples
from sdit.expert_parallel.placement import ExpertPlacement, path_need, ranks_needed
from sdit.expert_parallel.routing_table import RoutingTable, expert_counts

AssignmentKind = Literal["order", "path"]
# With these numbers the expected bytes are within 5 % of those of other batches (EP 4 and 8). Assigning a batch takes 1 ms.
MODEL_SAMPLES, MODEL_BATCHES = 1024, 32


def expert_parameters(experts: ExpertsConfig, width: int) -> int:
    """Return the number of parameters of one expert: D D + D, or D H + H + H D + D."""
    if experts.kind == "linear":
        return width * width + width
    return 2 * width * experts.hidden(width) + experts.hidden(width) + width


@dataclass(frozen=True)
class Speeds:
    """The speeds of an expert group: the bytes per second that a rank sends, the FLOP/s of its experts, and fixed seconds.

    Samples are sent in an all-to-all. A gather sends the weights of replicated experts, including the copies that it makes.
    `transfer_seconds` is the time of a transfer of a few bytes.
    """

    all_to_all_bytes_per_second: float
    gather_bytes_per_second: float
    flops_per_second: float
    transfer_seconds: float


@dataclass(frozen=True)
class ExpertFlops:
    """The FLOPs of one block in a forward pass: of the experts of a `sample`, and those that a `transfer` adds.

    Linear experts are merged before the product. A sample therefore needs one product on each rank that computes a part of
    its mixture, and each transfer adds one. MLP experts cannot be merged, and a transfer adds no product.
    """

    sample: float = 0.0
    transfer: float = 0.0

    @classmethod
    def of(cls, experts: ExpertsConfig, tokens: int, width: int) -> ExpertFlops:
        """Return the FLOPs for samples of L tokens. Merging weights, 1 / L of a product, is not counted."""
        if experts.kind == "linear":
            product = 2.0 * tokens * width * width
            return cls(product, product)
        return cls(4.0 * tokens * width * experts.hidden(width) * experts.top_k)


@dataclass(frozen=True)
class UnitCosts:
    """The bytes of a sample's tokens (`row_bytes` = L D x element size) and of one expert, for groups of `ranks` = P.

    A forward pass sends a row and its result, and sends the weights of a replicated expert to P - 1 ranks. The backward pass
    sends as many gradients in the other direction. `forwards` is 2 if activations are recomputed.

    A cost is in bytes of the group if `speeds` is None, and in seconds otherwise. The seconds assume that the ranks share the
    group's bytes and FLOPs equally, and that transfers do not overlap with computation.
    """

    row_bytes: int
    expert_bytes: int
    ranks: int
    forwards: int = 1
    speeds: Speeds | None = None
    flops: ExpertFlops = ExpertFlops()

    @property
    def transfer_bytes(self) -> int:
        """The bytes per micro-step of one sample on one rank other than the rank that it is assigned to."""
        return 2 * (self.forwards + 1) * self.row_bytes

    @property
    def replica_bytes(self) -> int:
        """The bytes per micro-step of one replicated expert, over the whole group."""
        return (self.forwards + 1) * (self.ranks - 1) * self.expert_bytes

    @property
    def transfer_cost(self) -> float:
        """The cost of one transfer, without the fixed part."""
        if self.speeds is None:
            return self.transfer_bytes
        sending = self.transfer_bytes / self.speeds.all_to_all_bytes_per_second
        return sending / self.ranks + self._compute_seconds(self.flops.transfer)

    @property
    def replica_cost(self) -> float:
        """The cost of one replicated expert, without the fixed part."""
        if self.speeds is None:
            return self.replica_bytes
        return self.replica_bytes / self.speeds.gather_bytes_per_second / self.ranks

    @property
    def fixed_costs(self) -> tuple[float, float]:
        """The fixed costs of a block in which any sample is sent, and of a block with any replicated expert.

        Each forward pass sends rows and their results, or weights. Each backward pass sends as much.
        """
        seconds = 0.0 if self.speeds is None else self.speeds.transfer_seconds
        return 2 * (self.forwards + 1) * seconds, (self.forwards + 1) * seconds

    def work_seconds(self, samples: float) -> float:
        """Return the seconds of the experts' products for `samples` samples and blocks, divided equally over the ranks."""
        return samples * self._compute_seconds(self.flops.sample)

    def moving_cost(self, size_bytes: float) -> float:
        """Return the cost of sending `size_bytes` to other ranks once."""
        return size_bytes if self.speeds is None else size_bytes / self.speeds.all_to_all_bytes_per_second / self.ranks

    def _compute_seconds(self, forward_flops: float) -> float:
        """The backward pass of a product has two products of its size."""
        assert self.speeds is not None
        return (self.forwards + 2) * forward_flops / self.speeds.flops_per_second / self.ranks


def unit_costs(model: ModelConfig, parallel: ParallelConfig, element_bytes: int, ranks: int) -> UnitCosts:
    """Return the unit costs of a run with EP `ranks`. They have speeds if the config does."""
    costs = parallel.exchange_costs
    return UnitCosts(
        row_bytes=model.tokens * model.width * element_bytes,
        expert_bytes=expert_parameters(model.experts, model.width) * element_bytes,
        ranks=ranks,
        forwards=1 if parallel.activation_checkpointing == "none" else 2,
        speeds=Speeds(**costs) if isinstance(costs, dict) else None,
        flops=ExpertFlops.of(model.experts, model.tokens, model.width),
    )


class TrafficModel:
    """A fixed set of micro-batches of one group, drawn by the weights of the tasks. Placements are compared on it."""

    def __init__(self, routes: RoutingTable, ranks: int, per_rank: int, assignment: AssignmentKind = "path") -> None:
        self.routes, self.ranks, self.per_rank, self.assignment = routes, ranks, per_rank, assignment
        samples = ranks * per_rank
        batches = min(max(1, MODEL_SAMPLES // samples), MODEL_BATCHES)
        self.tasks = routes.random_tasks(np.random.default_rng(0), (batches, samples))
        self._assigned_ranks: dict[bytes, np.ndarray] = {}  # by the need of the tasks

    @property
    def batches(self) -> int:
        """The number of random micro-batches."""
        return len(self.tasks)

    def ranks_in_order(self) -> np.ndarray:
        """Return (batches, n), the ranks that load the samples."""
        return np.broadcast_to(np.arange(self.tasks.shape[1]) % self.ranks, self.tasks.shape)

    def assigned_ranks(self, placement: ExpertPlacement) -> np.ndarray:
        """Return (batches, n), the ranks that samples are assigned to under the placement.

        It is computed once for placements with the same need: a choice compares few placements many times.
        """
        if self.assignment == "order":
            return self.ranks_in_order()
        need = path_need(self.routes.experts, placement)
        key = need.tobytes()
        if key not in self._assigned_ranks:
            assigned = [assign_samples(tasks, need, self.per_rank) for tasks in self.tasks]
            self._assigned_ranks[key] = np.stack(assigned)
        return self._assigned_ranks[key]

    def transfers(self, placement: ExpertPlacement, assigned_rank: np.ndarray | None = None) -> float:
        """Return the number of transfers per micro-step of the group.

        One transfer is one sample that is sent to one other rank in one block.
        """
        assigned_rank = self.assigned_ranks(placement) if assigned_rank is None else assigned_rank
        return float(self._block_transfers(placement, assigned_rank).sum()) / self.batches

    def random_placement_bytes(self, costs: UnitCosts) -> float:
        """Return the expected bytes of the group if each (sample, expert) pair is sent separately to a random rank."""
        pairs = self.tasks.shape[1] * self.routes.depth * self.routes.top_k
        return pairs * (self.ranks - 1) / self.ranks * costs.transfer_bytes

    def bytes(self, placement: ExpertPlacement, costs: UnitCosts, assigned_rank: np.ndarray | None = None) -> float:
        """Return the expected bytes of the group in the forward and backward pass of one micro-step."""
        return (
            self.transfers(placement, assigned_rank) * costs.transfer_bytes
            + float(placement.replicated.sum()) * costs.replica_bytes
        )

    def cost(self, placement: ExpertPlacement, costs: UnitCosts, assigned_rank: np.ndarray | None = None) -> float:
        """Return the expected cost of the exchange in one micro-step: bytes of the group, or seconds."""
        if costs.speeds is None:
            return self.bytes(placement, costs, assigned_rank)
        return float(self.block_seconds(placement, costs, assigned_rank).sum())

    def block_seconds(
        self, placement: ExpertPlacement, costs: UnitCosts, assigned_rank: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (depth,), the expected seconds of the exchange of each block in one micro-step."""
        assigned_rank = self.assigned_ranks(placement) if assigned_rank is None else assigned_rank
        transfers = self._block_transfers(placement, assigned_rank)
        replicas = placement.replicated.sum(axis=1)
        with_transfers, with_replicas = costs.fixed_costs
        seconds = transfers.mean(axis=1) * costs.transfer_cost + (transfers > 0).mean(axis=1) * with_transfers
        seconds += replicas * costs.replica_cost + (replicas > 0) * with_replicas
        return seconds

    def _block_transfers(self, placement: ExpertPlacement, assigned_rank: np.ndarray) -> np.ndarray:
        """Return (depth, batches), the transfers of each block and batch."""
        needed = ranks_needed(self.routes.experts, placement)
        away = needed.sum(axis=2)
        return np.stack(
            [
                (away[:, tasks] - needed[:, tasks, ranks]).sum(axis=1)
                for tasks, ranks in zip(self.tasks, assigned_rank, strict=True)
            ],
            axis=1,
        )


def rank_work(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """Return (depth, P), the number of (sample, expert) pairs that each rank computes.

    `experts` and `kept` are (depth, n, k), the B samples of rank 0 first.
    """
    depth, samples, _ = experts.shape
    block = np.arange(depth)[:, None, None]
    assigned_rank = (np.arange(samples) // (samples // placement.ranks))[None, :, None]
    rank = np.where(placement.replicated[block, experts], assigned_rank, placement.expert_to_rank[block, experts])
    return expert_counts(rank, placement.ranks, kept)
