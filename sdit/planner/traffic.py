"""Bytes that a step sends: the experts' exchange by mode, and the gradients. EP ranks per group, M experts of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.expert_parallel.routing_table import RoutingTable, task_weights
from sdit.expert_parallel.strategy import decide_placement
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts, expert_parameters
from sdit.model.windows import expert_windows
from sdit.planner.layout import Job
from sdit.planner.token_traffic import token_exchange_bytes
from sdit.time_law import prior_law

Mode = Literal["tokens", "weights", "auto"]
MODES: tuple[Mode, ...] = ("tokens", "weights", "auto")
RouteKind = Literal["prior", "random"]


@dataclass(frozen=True)
class Exchange:
    """The expected exchange of experts.

    `step_bytes` are the bytes per optimizer step over all ranks, by mode. `buffer_bytes` are those that a rank keeps for
    backward in the config's mode.
    """

    step_bytes: dict[str, float]
    buffer_bytes: int
    load_imbalance: float


def plan_exchange(job: Job, routes: RouteKind) -> Exchange | None:
    """Return the exchange for the routes of the diffusion prior, or for random routes.

    Return None if experts are not sharded.
    """
    if job.expert_parallel == 1:
        return None
    token_bytes, token_buffer = token_exchange_bytes(job)
    if job.config.model.variant != "switch":
        return Exchange(dict.fromkeys(MODES, token_bytes), token_buffer, 1.0)
    model, parallel, ranks = job.config.model, job.config.parallel, job.expert_parallel
    hidden = int(model.width * model.experts.mlp_ratio)
    row_bytes = model.tokens * model.width * job.element_bytes
    expert_bytes = expert_parameters(model.experts.kind, model.width, hidden) * job.element_bytes
    forwards = 1 if parallel.activation_checkpointing == "none" else 2
    costs = UnitCosts(row_bytes, expert_bytes, ranks, forwards)
    table = prior_routes(job) if routes == "prior" else random_routes(job)
    traffic = TrafficModel(table, ranks, job.batch.micro_batch, parallel.seating)
    groups = job.world // ranks * job.batch.accumulation
    choices = {mode: decide_placement(parallel.placement, mode, traffic, costs) for mode in MODES}
    chosen = choices[parallel.exchange]
    transfers = traffic.transfers(chosen.placement) / ranks
    replicas_received = float(chosen.placement.replicated.sum()) * (ranks - 1) / ranks
    # Received rows are kept. Replicas are kept as received, and once more concatenated with the local experts.
    kept = (
        transfers * row_bytes
        + (2 * replicas_received + (model.depth * model.experts.count / ranks if replicas_received else 0))
        * expert_bytes
    )
    step_bytes = {mode: choice.bytes * groups + token_bytes for mode, choice in choices.items()}
    return Exchange(step_bytes, int(kept) + token_buffer, chosen.load_imbalance)


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
    experts = np.argsort(~by_block, axis=2, kind="stable")[:, :, : model.experts.top_k]
    gates = np.full(experts.shape, 1 / model.experts.top_k, dtype=np.float32)
    return RoutingTable(experts, gates, model.experts.count, task_weights(job.config))


def random_routes(job: Job) -> RoutingTable:
    """Return a random routing table with a fixed seed."""
    model = job.config.model
    scores = np.random.default_rng(0).random((model.depth, model.timesteps, model.experts.count))
    experts = np.argsort(scores, axis=2)[:, :, : model.experts.top_k]
    gates = np.full(experts.shape, 1 / model.experts.top_k, dtype=np.float32)
    return RoutingTable(experts, gates, model.experts.count, task_weights(job.config))
