"""One rank of the exchange tests. usage: exchange_worker.py FOLDER JOB... (ranks from the environment)

Rank 0 writes JOB-RANKS.json to the folder.

P ranks in a group, n samples of a group, L tokens, D width, M experts, k used per sample and block.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from sdit.cli import leave
from sdit.config import ExpertsConfig
from sdit.contracts import ONE_PART, Mixture
from sdit.model.moe.dispatch import Ready
from sdit.model.moe.experts import build_experts
from sdit.model.moe.gate import sparse_gates
from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan, PartPlan, part_rows, plan_blocks
from sdit.model.moe.traffic import Costs, expert_parameters
from sdit.parallel.comm import Comm, find_rank
from sdit.parallel.dispatch import ExchangeDispatcher
from sdit.parallel.exchange import Traffic, Wire
from sdit.parallel.experts import SpreadExperts, make_expert_groups
from sdit.topology import ExpertGroups
from tests.distributed.exchange_bytes import measured_bytes
from tests.distributed.exchange_state import error, held_sizes, moved_experts, sampled_images

ROUTINGS, TOKENS, WIDTH = 500, 2, 6
SCENARIOS = ("any", "one expert for all", "one sample per rank", "few experts", "capacity drops", "all dropped")


class Drawn(NamedTuple):
    """A random routing; `experts` and `kept` (depth, n, k) in seated order."""

    scenario: str
    config: ExpertsConfig
    overlap: bool
    layout: Layout
    experts: np.ndarray
    kept: np.ndarray | None
    halves: bool


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
    place = rng.permuted(np.tile(np.arange(count) // (count // ranks), (depth, 1)), axis=1)
    at_hand = rng.random(place.shape) < rng.choice([0.0, 0.3, 1.0], p=[0.4, 0.4, 0.2])
    experts = order[:, :, :top_k]
    kept = rng.random(experts.shape) < 0.5 if scenario == "capacity drops" else None
    kept = np.zeros(experts.shape, dtype=bool) if scenario == "all dropped" else kept
    config = ExpertsConfig(count=count, top_k=top_k, kind=kind, mlp_ratio=2.0)  # type: ignore[arg-type]
    overlap, halves = rng.random(2) < 0.5
    return Drawn(scenario, config, bool(overlap), Layout(place, at_hand, ranks), experts, kept, bool(halves))


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


def run_blocks(z: Tensor, start: Callable[[int, Tensor, int], Mixture], depth: int, parts: Sequence[slice]) -> Tensor:
    """The blocks on tokens z (B, L, D), in the turns that the model takes."""
    rows = [z[part] for part in parts]
    under_way = [start(0, rows[part], part) for part in range(len(parts))]
    for block in range(depth):
        for part in range(len(parts)):
            under_way[(part + 1) % len(parts)].serve()
            rows[part] = rows[part] + torch.tanh(under_way[part].wait())
            if block + 1 < depth:
                under_way[part] = start(block + 1, rows[part], part)
    return torch.cat(rows)


def run_dense(drawn: Drawn, inputs: Inputs) -> Tensor:
    """(n, L, D): every expert on every sample, weighted by gates that are zero where it is not used."""
    chosen = torch.from_numpy(np.ascontiguousarray(drawn.experts))
    gates = sparse_gates(inputs.probs, chosen, None if drawn.kept is None else torch.from_numpy(drawn.kept))
    functions = [build_experts(drawn.config, WIDTH).each(**stack) for stack in inputs.stacks]

    def mix(block: int, z: Tensor, _: int) -> Ready:
        terms = [gates[block, :, j, None, None] * expert(z) for j, expert in enumerate(functions[block])]
        return Ready(torch.stack(terms).sum(0))

    return run_blocks(inputs.z, mix, len(inputs.stacks), ONE_PART)


def spread_rows(config: ExpertsConfig, stack: dict[str, Tensor], ids: np.ndarray, ranks: int) -> SpreadExperts:
    local = build_experts(config, WIDTH, ids.tolist()).double()
    with torch.no_grad():
        for name, parameter in local.named_parameters():
            parameter.copy_(stack[name][torch.from_numpy(ids)])
    return SpreadExperts(local, config.count, ranks)


def wire_of(comm: Comm, ranks: int, overlap: bool) -> Wire:
    make_expert_groups(ranks)
    group = deepspeed_groups._get_expert_parallel_group(f"ep_size_{ranks}")
    return Wire(group, ExpertGroups(comm.world, ranks).place_of(comm.rank), ranks, overlap, Traffic())


def check_routing(seed: int, comm: Comm) -> dict[str, Any]:
    """Errors of this rank's results and gradients over the largest true value, and bytes beyond the plan's."""
    drawn = draw(seed, comm.world)
    truth, mine = draw_inputs(drawn, seed), draw_inputs(drawn, seed)
    (run_dense(drawn, truth) * truth.cotangent).sum().backward()
    layout, ranks = drawn.layout, drawn.layout.ranks
    depth, samples, _ = drawn.experts.shape
    wire = wire_of(comm, ranks, drawn.overlap)
    per_rank = samples // ranks
    own = slice(wire.place * per_rank, (wire.place + 1) * per_rank)
    parts = tuple(
        PartPlan(rows, plan_blocks(drawn.experts, drawn.kept, layout, wire.place, rows))
        for rows in part_rows(per_rank, drawn.halves)
    )
    plan = MicroPlan(np.arange(samples), np.arange(samples), own, drawn.experts, drawn.kept, None, parts)
    dispatcher = ExchangeDispatcher(wire)
    dispatcher.follow(plan, layout, comm.device)
    slots = layout.slots[:, wire.place]
    experts = [spread_rows(drawn.config, stack, ids, ranks) for stack, ids in zip(mine.stacks, slots, strict=True)]
    if drawn.overlap:
        dispatcher.look_ahead(experts)
    view = dispatcher.view(torch.arange(samples)[own])
    assert view.experts is not None
    gates = sparse_gates(mine.probs, view.experts, view.kept)
    z = mine.z.detach()[own].requires_grad_()

    def start(block: int, rows: Tensor, part: int) -> Mixture:
        return dispatcher.start(block, rows, gates[block], experts[block], part)

    out = run_blocks(z, start, depth, view.parts)
    (out * mine.cotangent[own]).sum().backward()
    assert (
        mine.probs.grad is not None and truth.probs.grad is not None and truth.z.grad is not None and z.grad is not None
    )
    dist.all_reduce(mine.probs.grad, group=wire.group)
    errors = {
        "output": error(out, run_dense(drawn, truth)[own]),
        "tokens": error(z.grad, truth.z.grad[own]),
        "gates": error(mine.probs.grad, truth.probs.grad),
        "weights": max(
            error(parameter.grad, truth.stacks[block][name].grad[torch.from_numpy(slots[block])])
            for block in range(depth)
            for name, parameter in experts[block].named_parameters()
        ),
    }
    sizes, _ = wire.traffic.take()
    row, expert = TOKENS * WIDTH * 8, 8 * expert_parameters(drawn.config.kind, WIDTH, 2 * WIDTH)
    costs = Costs(row, expert, ranks)
    planned = sum(  # the weights at hand go once, whatever the parts
        block.sent_bytes(costs, hand if number == 0 else np.zeros_like(hand), place == wire.place)
        for number, part in enumerate(parts)
        for block, hand, place in zip(part.blocks, layout.at_hand, layout.place, strict=True)
    )
    return {"errors": errors, "surplus_bytes": sum(sizes.values()) - planned, "parts": len(parts)}


def random_routings(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    found = []
    for seed in range(ROUTINGS):
        ranks = comm.gather(check_routing(seed, comm))
        drawn = draw(seed, comm.world)
        worst = {key: max(rank["errors"][key] for rank in ranks) for key in ranks[0]["errors"]}
        surplus = [rank["surplus_bytes"] for rank in ranks]
        facts = {"scenario": drawn.scenario, "kind": drawn.config.kind, "parts": ranks[0]["parts"]}
        found.append({**facts, "errors": worst, "surplus_bytes": surplus})
    return found


JOBS = {job.__name__: job for job in (random_routings, sampled_images, moved_experts, held_sizes, measured_bytes)}


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
