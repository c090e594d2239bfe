"""One rank of the exchange tests. usage: exchange_worker.py FOLDER JOB... (ranks from the environment)

Rank 0 writes JOB-RANKS.json to the folder.

P ranks in a group, n samples of a group, L tokens, D width, M experts, k used per sample and block.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sdit.cli.process import leave
from sdit.config import Config, ExpertsConfig, ParallelConfig, ResolvedRun
from sdit.distributed.comm import Comm, find_rank
from sdit.distributed.deepspeed_internals import make_expert_groups
from sdit.expert_parallel.all_to_all import ExpertGroup, TrafficCounter
from sdit.expert_parallel.device_plan import pack_plan
from sdit.expert_parallel.dispatcher import PlannedPass
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.step_plan import MicroStepPlan, plan_blocks
from sdit.expert_parallel.traffic_model import UnitCosts, expert_parameters
from sdit.model.moe.experts import build_experts
from sdit.model.moe.gate import sparse_gates
from sdit.topology import ExpertGroups, plan_batch
from tests.distributed.exchange_bytes import bytes_under_a_law, measured_bytes, more_measured_bytes
from tests.distributed.exchange_state import (
    error,
    held_sizes,
    model_config,
    more_moved_experts,
    moved_experts,
    sampled_images,
)
from tests.unit.plan_bytes import sent_bytes

ROUTINGS, MORE_ROUTINGS, TOKENS, WIDTH = 180, 320, 2, 6
SCENARIOS = ("any", "one expert for all", "one sample per rank", "few experts", "capacity drops", "all dropped")


class Drawn(NamedTuple):
    """A random routing; `experts` and `kept` (depth, n, k) in the order of their ranks."""

    scenario: str
    config: ExpertsConfig
    overlap: bool
    placement: ExpertPlacement
    experts: np.ndarray
    kept: np.ndarray | None


def draw(seed: int, world: int) -> Drawn:
    rng = np.random.default_rng(seed)
    scenario, kind = SCENARIOS[seed % len(SCENARIOS)], ("linear", "mlp")[seed // len(SCENARIOS) % 2]
    ranks = world if rng.random() < 0.7 else world // 2
    count, depth = ranks * int(rng.integers(1, 4)), int(rng.integers(1, 3))
    top_k = int(rng.integers(1, min(count, 3) + 1))
    samples = ranks * (1 if scenario == "one sample per rank" else int(rng.integers(1, 5)))
    order = np.argsort(rng.random((depth, samples, count)), axis=2)
    if scenario in ("one expert for all", "few experts"):
        top_k = 1 if scenario == "one expert for all" else top_k
        order = np.broadcast_to(order[:, :1], order.shape)
    owners = rng.permuted(np.tile(np.arange(count) // (count // ranks), (depth, 1)), axis=1)
    replicated = rng.random(owners.shape) < rng.choice([0.0, 0.3, 1.0], p=[0.4, 0.4, 0.2])
    experts = order[:, :, :top_k]
    kept = rng.random(experts.shape) < 0.5 if scenario == "capacity drops" else None
    kept = np.zeros(experts.shape, dtype=bool) if scenario == "all dropped" else kept
    config = ExpertsConfig(count=count, top_k=top_k, kind=kind, mlp_ratio=2.0)  # type: ignore[arg-type]
    overlap = rng.random() < 0.5
    return Drawn(scenario, config, bool(overlap), ExpertPlacement(owners, replicated, ranks), experts, kept)


class Inputs(NamedTuple):
    """Leaves in float64: tokens `z` (n, L, D), `probs` (depth, n, M), stacks of all experts, and a cotangent of z."""

    z: Tensor
    probs: Tensor
    stacks: list[dict[str, Tensor]]
    cotangent: Tensor


def draw_inputs(drawn: Drawn, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    depth, samples, _ = drawn.experts.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {name: p.shape for name, p in build_experts(drawn.config, WIDTH).named_parameters()}
    stacks = [{name: normal(*shape).requires_grad_() for name, shape in shapes.items()} for _ in range(depth)]
    probs = normal(depth, samples, drawn.config.count).softmax(-1).requires_grad_()
    return Inputs(normal(samples, TOKENS, WIDTH).requires_grad_(), probs, stacks, normal(samples, TOKENS, WIDTH))


def run_blocks(z: Tensor, mix: Callable[[int, Tensor], Tensor], depth: int) -> Tensor:
    """The blocks on tokens z (B, L, D)."""
    for block in range(depth):
        z = z + torch.tanh(mix(block, z))
    return z


def run_dense(drawn: Drawn, inputs: Inputs) -> Tensor:
    """(n, L, D): every expert on every sample, weighted by gates that are zero where it is not used."""
    chosen = torch.from_numpy(np.ascontiguousarray(drawn.experts))
    gates = sparse_gates(inputs.probs, chosen, None if drawn.kept is None else torch.from_numpy(drawn.kept))

    def mix(block: int, z: Tensor) -> Tensor:
        stack = inputs.stacks[block]
        terms = [gates[block, :, j, None, None] * one_expert(stack, j, z) for j in range(drawn.config.count)]
        return torch.stack(terms).sum(0)

    return run_blocks(inputs.z, mix, len(inputs.stacks))


def one_expert(stack: dict[str, Tensor], j: int, z: Tensor) -> Tensor:
    """Output of expert j of a stack for tokens z (n, L, D)."""
    if "w" in stack:
        return z @ stack["w"][j] + stack["b"][j]
    hidden = torch.nn.functional.gelu(z @ stack["w1"][j] + stack["b1"][j], approximate="tanh")
    return hidden @ stack["w2"][j] + stack["b2"][j]


def sharded_rows(config: ExpertsConfig, stack: dict[str, Tensor], ids: np.ndarray, ranks: int) -> ShardedExperts:
    local = build_experts(config, WIDTH, ids.tolist()).double()
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            parameter.copy_(stack[name][torch.from_numpy(ids)])
    return ShardedExperts(local, config.count, ranks)


def group_of(comm: Comm, ranks: int, overlap: bool) -> ExpertGroup:
    ep_rank = ExpertGroups(comm.world, ranks).ep_rank_of(comm.rank)
    return ExpertGroup(make_expert_groups(ranks), ep_rank, ranks, overlap, TrafficCounter())


def check_routing(seed: int, comm: Comm) -> dict[str, Any]:
    """Errors of this rank's results and gradients over the largest true value, and bytes beyond the plan's."""
    drawn = draw(seed, comm.world)
    truth, mine = draw_inputs(drawn, seed), draw_inputs(drawn, seed)
    (run_dense(drawn, truth) * truth.cotangent).sum().backward()
    placement, ranks = drawn.placement, drawn.placement.ranks
    depth, samples, _ = drawn.experts.shape
    group = group_of(comm, ranks, drawn.overlap)
    per_rank = samples // ranks
    own = slice(group.ep_rank * per_rank, (group.ep_rank + 1) * per_rank)
    blocks = plan_blocks(drawn.experts, drawn.kept, placement, group.ep_rank)
    plan = MicroStepPlan(np.arange(samples), np.arange(samples), own, drawn.experts, drawn.kept, None, blocks)
    held = placement.experts_of_rank[:, group.ep_rank]
    experts = [sharded_rows(drawn.config, stack, ids, ranks) for stack, ids in zip(mine.stacks, held, strict=True)]
    device_plan = pack_plan(plan, placement, group.ep_rank).to_device(comm.device)
    forward_pass = PlannedPass(group, device_plan, experts if drawn.overlap else ())
    assert forward_pass.view.experts is not None
    gates = sparse_gates(mine.probs, forward_pass.view.experts, forward_pass.view.kept)
    z = mine.z.detach()[own].requires_grad_()

    def mix(block: int, rows: Tensor) -> Tensor:
        dispatched = forward_pass.dispatch(block, rows, gates[block], experts[block])
        return forward_pass.combine(forward_pass.compute(dispatched))

    out = run_blocks(z, mix, depth)
    (out * mine.cotangent[own]).sum().backward()
    assert (
        mine.probs.grad is not None and truth.probs.grad is not None and truth.z.grad is not None and z.grad is not None
    )
    dist.all_reduce(mine.probs.grad, group=group.process_group)
    errors = {
        "output": error(out, run_dense(drawn, truth)[own]),
        "tokens": error(z.grad, truth.z.grad[own]),
        "gates": error(mine.probs.grad, truth.probs.grad),
        "weights": max(
            error(parameter.grad, truth.stacks[block][name].grad[torch.from_numpy(held[block])])
            for block in range(depth)
            for name, parameter in experts[block].named_parameters()
        ),
    }
    sizes, _ = group.traffic.take()
    row, expert = TOKENS * WIDTH * 8, 8 * expert_parameters(drawn.config, WIDTH)
    costs = UnitCosts(row, expert, ranks)
    planned = sum(
        sent_bytes(block, costs, replicated, owners == group.ep_rank)
        for block, replicated, owners in zip(blocks, placement.replicated, placement.expert_to_rank, strict=True)
    )
    return {"errors": errors, "surplus_bytes": sum(sizes.values()) - planned}


def random_routings(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    return checked_routings(comm, range(ROUTINGS))


def more_random_routings(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    return checked_routings(comm, range(ROUTINGS, ROUTINGS + MORE_ROUTINGS))


def checked_routings(comm: Comm, seeds: range) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        ranks = comm.gather(check_routing(seed, comm))
        drawn = draw(seed, comm.world)
        worst = {key: max(rank["errors"][key] for rank in ranks) for key in ranks[0]["errors"]}
        surplus = [rank["surplus_bytes"] for rank in ranks]
        facts = {"scenario": drawn.scenario, "kind": drawn.config.kind}
        found.append({**facts, "errors": worst, "surplus_bytes": surplus})
    return found


def measured_speeds(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """For each rank: the stored layout of a run that measures its speeds, and that of a run which continues with it."""
    config = Config(model=model_config(8, "linear", 4), parallel=ParallelConfig(expert=2, exchange_costs="measured"))
    run = ResolvedRun(config, {}, plan_batch(8, None, comm.world), 2, comm.world, 0)
    rng = np.random.default_rng(0)
    routes = RoutingTable(np.argsort(rng.random((2, 1000, 4)), axis=2)[:, :, :2], np.ones((2, 1000, 2), np.float32), 4)
    experts, resumed = ExpertParallel(run, comm), ExpertParallel(run, comm)
    experts.rebalancer.better_placement(routes, placement_due=True, is_first=True)
    resumed.restore(experts.stored())
    resumed.rebalancer.better_placement(routes, placement_due=True, is_first=True)
    sent = sum(experts.take_traffic()[:-1])
    return comm.gather({"stored": experts.stored(), "resumed": resumed.stored(), "counted_bytes": sent})


JOBS = {
    job.__name__: job
    for job in (
        random_routings, more_random_routings, sampled_images, moved_experts, more_moved_experts, held_sizes,
        measured_bytes, more_measured_bytes, bytes_under_a_law, measured_speeds,
    )
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with Comm(find_rank(os.environ), timeout_seconds=60) as comm:
        for name in sys.argv[2:]:
            found = JOBS[name](comm, folder)
            if comm.is_first:
                (folder / f"{name}-{comm.world}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
