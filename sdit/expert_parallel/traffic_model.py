"""Communication volume in bytes: unit costs, the expected bytes of a placement, and the exact bytes of a plan.

P ranks per group, B samples per rank and micro-step, n = P * B, L tokens, D width, H hidden width, M experts of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.expert_parallel.assignment import assign_samples
from sdit.expert_parallel.placement import ExpertPlacement, path_need, ranks_needed
from sdit.expert_parallel.routing_table import RoutingTable

AssignmentKind = Literal["order", "path"]
# With these numbers the expected bytes are within 5 % of those of other batches (EP 4 and 8). Assigning a batch takes 1 ms.
MODEL_SAMPLES, MODEL_BATCHES = 1024, 32


def expert_parameters(kind: Literal["linear", "mlp"], width: int, hidden: int) -> int:
    """Return the number of parameters of one expert: D D + D, or D H + H + H D + D."""
    if kind == "linear":
        return width * width + width
    return 2 * width * hidden + hidden + width


@dataclass(frozen=True)
class UnitCosts:
    """The bytes of a sample's tokens (`row_bytes` = L D x element size) and of one expert, for groups of `ranks` = P.

    A forward pass sends a row and its result, and sends the weights of a replicated expert to P - 1 ranks. The backward pass
    sends as many gradients in the other direction. `forwards` is 2 if activations are recomputed.
    """

    row_bytes: int
    expert_bytes: int
    ranks: int
    forwards: int = 1

    @property
    def transfer_bytes(self) -> int:
        """The bytes per micro-step of one sample on one rank other than the rank that it is assigned to."""
        return 2 * (self.forwards + 1) * self.row_bytes

    @property
    def replica_bytes(self) -> int:
        """The bytes per micro-step of one replicated expert, over the whole group."""
        return (self.forwards + 1) * (self.ranks - 1) * self.expert_bytes

    def sent_bytes(self, rows_sent: int, rows_received: int, replicas_owned: int, replicas_received: int) -> int:
        """Return the exact bytes that one rank sends per micro-step.

        `replicas_owned` are its replicated experts, and `replicas_received` those of the other ranks.
        """
        rows = (self.forwards + 1) * (rows_sent + rows_received) * self.row_bytes
        weights = self.forwards * (self.ranks - 1) * replicas_owned + replicas_received
        return rows + weights * self.expert_bytes


class TrafficModel:
    """A fixed set of micro-batches of one group, drawn by the weights of the tasks. Placements are compared on it."""

    def __init__(self, routes: RoutingTable, ranks: int, per_rank: int, assignment: AssignmentKind = "path") -> None:
        self.routes, self.ranks, self.per_rank, self.assignment = routes, ranks, per_rank, assignment
        samples = ranks * per_rank
        batches = min(max(1, MODEL_SAMPLES // samples), MODEL_BATCHES)
        self.tasks = routes.random_tasks(np.random.default_rng(0), (batches, samples))

    @property
    def batches(self) -> int:
        """The number of random micro-batches."""
        return len(self.tasks)

    def ranks_in_order(self) -> np.ndarray:
        """Return (batches, n), the ranks that load the samples."""
        return np.broadcast_to(np.arange(self.tasks.shape[1]) % self.ranks, self.tasks.shape)

    def assigned_ranks(self, placement: ExpertPlacement) -> np.ndarray:
        """Return (batches, n), the ranks that samples are assigned to under the placement."""
        if self.assignment == "order":
            return self.ranks_in_order()
        need = path_need(self.routes.experts, placement)
        return np.stack([assign_samples(tasks, need, self.per_rank) for tasks in self.tasks])

    def transfers(self, placement: ExpertPlacement, assigned_rank: np.ndarray | None = None) -> float:
        """Return the number of transfers per micro-step of the group.

        One transfer is one sample that is sent to one other rank in one block.
        """
        assigned_rank = self.assigned_ranks(placement) if assigned_rank is None else assigned_rank
        need = path_need(self.routes.experts, placement)[self.tasks]
        stays = np.take_along_axis(need, assigned_rank[..., None], axis=2)
        return float(need.sum() - stays.sum()) / self.batches

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


def rank_work(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """Return (depth, P), the number of (sample, expert) pairs that each rank computes.

    `experts` and `kept` are (depth, n, k), the B samples of rank 0 first.
    """
    depth, samples, _ = experts.shape
    block = np.arange(depth)[:, None, None]
    assigned_rank = (np.arange(samples) // (samples // placement.ranks))[None, :, None]
    rank = np.where(placement.replicated[block, experts], assigned_rank, placement.expert_to_rank[block, experts])
    flat = rank + block * placement.ranks
    flat = flat.ravel() if kept is None else flat[kept]
    return np.bincount(flat, minlength=depth * placement.ranks).reshape(depth, placement.ranks)


def group_transfers(experts: np.ndarray, placement: ExpertPlacement, kept: np.ndarray | None = None) -> np.ndarray:
    """Return (depth,), the number of samples that are sent in each block, counted once per destination.

    The samples are in the order of their ranks.
    """
    needed = ranks_needed(experts, placement, kept)
    depth, samples, ranks = needed.shape
    stays = needed.reshape(depth, ranks, samples // ranks, ranks)[:, np.arange(ranks), :, np.arange(ranks)]
    return needed.sum(axis=(1, 2)) - stays.sum(axis=(0, 2))
