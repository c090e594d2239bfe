"""Bytes that a step sends: the experts' exchange by mode, and the gradients. EP ranks per group, M experts of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sdit.expert_parallel.routing_table import RoutingTable, task_weights
from sdit.expert_parallel.strategy import Choice, ExchangeKind, decide_placement
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts, unit_costs
from sdit.model.windows import expert_windows
from sdit.planner.layout import DeviceKind, Job
from sdit.planner.token_traffic import token_exchange_bytes
from sdit.time_law import prior_law

MODES: tuple[ExchangeKind, ...] = ("tokens", "weights", "auto")
RouteKind = Literal["prior", "random"]
# Fields of `Exchange` that are added for experts of both kinds.
ADDED = ("buffer_bytes", "row_bytes", "replica_bytes", "row_messages", "replica_messages", "served_rows")


@dataclass(frozen=True)
class Exchange:
    """The expected exchange of experts.

    `step_bytes` are the bytes per optimizer step over all ranks, by mode. All else is of the config's mode: `buffer_bytes`
    are those that a rank keeps for backward, `row_bytes` and `replica_bytes` those that it sends per step as tokens and as
    weights of replicated experts, in `row_messages` and `replica_messages` all-to-alls. `served_rows` are the samples per
    step and block that it computes for other ranks, summed over the blocks. `load_imbalance` is max / mean of the ranks' work.
    """

    step_bytes: dict[str, float]
    buffer_bytes: int
    row_bytes: float
    replica_bytes: float
    row_messages: int
    replica_messages: int
    served_rows: float
    load_imbalance: float

    def plus(self, other: Exchange) -> Exchange:
        """Return both exchanges of a step together. The load imbalance is this one's."""
        step_bytes: dict[str, float] = {mode: self.step_bytes[mode] + other.step_bytes[mode] for mode in MODES}
        added = {name: getattr(self, name) + getattr(other, name) for name in ADDED}
        return replace(self, step_bytes=step_bytes, **added)


def plan_exchange(job: Job, routes: RouteKind, device: DeviceKind = "cpu") -> Exchange | None:
    """Return the exchange in the config's mode for the routes of the diffusion prior, or for random routes.

    Return None if experts are not sharded. A GPU sends buffers of token-routed experts as large as their capacity allows.
    """
    return None if job.expert_parallel == 1 else plan_exchanges(job, routes, device)[job.config.parallel.exchange]


def plan_exchanges(job: Job, routes: RouteKind, device: DeviceKind) -> dict[ExchangeKind, Exchange]:
    """Return the exchange of sharded experts in each mode."""
    tokens = _token_exchange(job, device)
    if job.config.model.variant != "switch":
        return dict.fromkeys(MODES, tokens)
    model, parallel, ranks = job.config.model, job.config.parallel, job.expert_parallel
    costs = unit_costs(model, parallel, job.element_bytes, ranks)
    table = prior_routes(job) if routes == "prior" else random_routes(job)
    traffic = TrafficModel(table, ranks, job.batch.micro_batch, parallel.seating)
    groups = job.world // ranks * job.batch.accumulation
    choices = {mode: decide_placement(parallel.placement, mode, traffic, costs) for mode in MODES}
    step_bytes: dict[str, float] = {mode: choice.bytes * groups for mode, choice in choices.items()}
    return {mode: _exchange(job, traffic, costs, choice, step_bytes).plus(tokens) for mode, choice in choices.items()}


def _exchange(
    job: Job, traffic: TrafficModel, costs: UnitCosts, choice: Choice, step_bytes: dict[str, float]
) -> Exchange:
    """Return what a rank keeps and sends under a choice."""
    model, ranks, passes, ways = job.config.model, costs.ranks, job.batch.accumulation, costs.forwards + 1
    replicated = choice.placement.replicated
    transfers = traffic.transfers(choice.placement) / ranks
    replicas_received = float(replicated.sum()) * (ranks - 1) / ranks
    # Received rows are kept. Replicas are kept as received, and once more concatenated with the local experts.
    local = model.depth * model.experts.count / ranks if replicas_received else 0
    kept = transfers * costs.row_bytes + (2 * replicas_received + local) * costs.expert_bytes
    blocks_with_rows = int((~replicated).any(axis=1).sum()) if transfers else 0
    return Exchange(
        step_bytes=step_bytes,
        buffer_bytes=int(kept),
        row_bytes=passes * transfers * costs.transfer_bytes,
        replica_bytes=passes * float(replicated.sum()) * costs.replica_bytes / ranks,
        row_messages=passes * 2 * ways * blocks_with_rows,
        replica_messages=passes * ways * int(replicated.any(axis=1).sum()),
        served_rows=passes * transfers,
        load_imbalance=choice.load_imbalance,
    )


def _token_exchange(job: Job, device: DeviceKind) -> Exchange:
    """Return the exchange of token-routed experts. A block exchanges sizes once, and rows there and back in each pass."""
    step_bytes, buffer_bytes = token_exchange_bytes(job, device)
    forwards = 1 if job.config.parallel.activation_checkpointing == "none" else 2
    messages = (2 * (forwards + 1) + 1) * len(job.config.model.moe_blocks) * job.batch.accumulation
    return Exchange(
        step_bytes=dict.fromkeys(MODES, step_bytes),
        buffer_bytes=buffer_bytes,
        row_bytes=step_bytes / job.world,
        replica_bytes=0.0,
        row_messages=messages,
        replica_messages=0,
        served_rows=0.0,  # a pair is computed once, wherever it is
        load_imbalance=1.0,
    )


def gradient_traffic_bytes(job: Job) -> float:
    """Return the bytes that all ranks send per step to reduce gradients and, under ZeRO, to gather weights.

    Ring algorithms are assumed.
    """
    return sum(
        2.0 * (group.ranks - 1) * group.numel * job.element_bytes * (job.world / group.ranks) for group in job.groups
    )


def prior_routes(job: Job) -> RoutingTable:
    """Return the routing table that follows the prior's windows.

    Column c of the prior's mask is expert c // depth of block c % depth.
    """
    model = job.config.model
    mask = expert_windows(model, prior_law(job.config)).mask
    by_block = mask.reshape(model.timesteps, model.experts.count, model.depth).transpose(2, 0, 1)
    return _table(job, np.argsort(~by_block, axis=2, kind="stable"))


def random_routes(job: Job) -> RoutingTable:
    """Return a random routing table with a fixed seed."""
    model = job.config.model
    scores = np.random.default_rng(0).random((model.depth, model.timesteps, model.experts.count))
    return _table(job, np.argsort(scores, axis=2))


def _table(job: Job, order: np.ndarray) -> RoutingTable:
    """Return the table of equal gates for the first k experts of `order` (depth, T, M)."""
    top_k, count = job.config.model.experts.top_k, job.config.model.experts.count
    experts = order[:, :, :top_k]
    gates = np.full(experts.shape, 1 / top_k, dtype=np.float32)
    return RoutingTable(experts, gates, count, task_weights(job.config))
