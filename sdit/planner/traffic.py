"""Bytes on the wire of a step: the experts' exchange by mode, and the gradients. EP ranks per group, M experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.strategy import decide_placement
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts, expert_parameters
from sdit.model.windows import expert_windows
from sdit.planner.layout import Job

Mode = Literal["tokens", "weights", "auto"]
MODES: tuple[Mode, ...] = ("tokens", "weights", "auto")
RouteKind = Literal["prior", "random"]


@dataclass(frozen=True)
class Exchange:
    """Expected bytes per optimizer step over all ranks, by mode; and those a rank keeps for backward under the config's."""

    step_bytes: dict[str, float]
    buffer_bytes: int
    load_imbalance: float


def plan_exchange(job: Job, routes: RouteKind) -> Exchange | None:
    """The exchange for routes as the diffusion prior asks for them, or without structure; None where nothing travels."""
    if job.expert_parallel == 1:
        return None
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
    foreign = float(chosen.placement.replicated.sum()) * (ranks - 1) / ranks
    # Rows are kept where they arrive. Replicas are kept as they came and concatenated with the rank's own experts.
    kept = (
        transfers * row_bytes
        + (2 * foreign + (model.depth * model.experts.count / ranks if foreign else 0)) * expert_bytes
    )
    return Exchange({mode: choice.bytes * groups for mode, choice in choices.items()}, int(kept), chosen.load_imbalance)


def gradient_traffic_bytes(job: Job) -> float:
    """Bytes that all ranks send per step to reduce gradients and, under ZeRO, to gather weights (ring algorithms)."""
    return sum(
        2.0 * (group.ranks - 1) * group.numel * job.element_bytes * (job.world / group.ranks) for group in job.groups
    )


def prior_routes(job: Job) -> RoutingTable:
    """The routing table that the prior's windows ask for; column c of its mask is expert c // depth of block c % depth."""
    model = job.config.model
    mask = expert_windows(model).mask
    by_block = mask.reshape(model.timesteps, model.experts.count, model.depth).transpose(2, 0, 1)
    experts = np.argsort(~by_block, axis=2, kind="stable")[:, :, : model.experts.top_k]
    gates = np.full(experts.shape, 1 / model.experts.top_k, dtype=np.float32)
    return RoutingTable(experts, gates, model.experts.count)


def random_routes(job: Job) -> RoutingTable:
    """A random routing table, always the same."""
    model = job.config.model
    drawn = np.random.default_rng(0).random((model.depth, model.timesteps, model.experts.count))
    experts = np.argsort(drawn, axis=2)[:, :, : model.experts.top_k]
    gates = np.full(experts.shape, 1 / model.experts.top_k, dtype=np.float32)
    return RoutingTable(experts, gates, model.experts.count)
