"""One rank of the token exchange tests. usage: token_exchange_worker.py FOLDER FIRST STOP (ranks from the environment)

Checks the routings of the seeds FIRST..STOP - 1. Rank 0 writes routings.json to the folder.

N tokens of a rank, D width, M experts, M_local local ones, P ranks of a group.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn

from sdit.cli.process import leave
from sdit.config import ExpertsConfig
from sdit.distributed.comm import Comm, find_rank
from sdit.expert_parallel.token_exchange import ExchangedTokenPass
from sdit.model.moe.token_routes import TokenRoutes
from tests.distributed.exchange_state import error
from tests.distributed.exchange_worker import group_of, one_expert, sharded_rows

WIDTH, BYTES = 6, 8  # of float64
SCENARIOS = (
    "top k", "any pairs", "one expert for all", "one rank for all", "few experts", "no pairs", "equal weights",
    "weights of zero",
)  # fmt: skip


class Drawn(NamedTuple):
    """A random routing of a group: by block, `chosen` (P N, M) and `weights` (P N, M). `tokens` (P) are the N of each rank.

    `limit`: the most tokens of a rank, as one sample, that an expert takes. None: the sizes are exchanged.
    `experts_of_rank` (P, M_local) are ids, in order for one half of the routings.
    """

    scenario: str
    config: ExpertsConfig
    ranks: int
    overlap: bool
    recompute: bool
    tokens: list[int]
    limit: int | None
    chosen: list[np.ndarray]
    weights: list[np.ndarray]
    experts_of_rank: np.ndarray


def draw(seed: int, world: int) -> Drawn:
    rng = np.random.default_rng(seed)
    scenario = SCENARIOS[seed % len(SCENARIOS)]
    ranks = world if rng.random() < 0.7 else world // 2
    count = ranks * int(rng.integers(1, 4))
    top_k = int(rng.integers(1, min(count, 3) + 1))
    is_bounded, recompute = bool(seed // len(SCENARIOS) % 2), bool(seed // len(SCENARIOS) // 2 % 2)
    tokens = [
        int(each) for each in (rng.integers(1, 12, 1).repeat(ranks) if is_bounded else rng.integers(1, 12, ranks))
    ]
    depth = int(rng.integers(1, 3))
    masks = [draw_pairs(scenario, rng, (sum(tokens), count), top_k, ranks) for _ in range(depth)]
    weights = [np.where(mask, rng.random(mask.shape), 0.0) for mask in masks]
    if scenario == "equal weights":
        weights = [mask / top_k for mask in masks]
    if scenario == "weights of zero":
        weights = [
            np.where(rng.random(mask.shape) < 0.5, weight, 0.0) for mask, weight in zip(masks, weights, strict=True)
        ]
    config = ExpertsConfig(count=count, top_k=top_k, kind="mlp", mlp_ratio=2.0)
    loads = [mask.reshape(ranks, -1, count).sum(1).max() for mask in masks] if is_bounded else [0]
    limit = max(1, int(max(loads))) if is_bounded else None
    overlap = bool(rng.random() < 0.5)
    ids = np.arange(count) if rng.random() < 0.5 else rng.permutation(count)
    experts_of_rank = np.sort(ids.reshape(ranks, -1), axis=1)
    return Drawn(scenario, config, ranks, overlap, recompute, tokens, limit, masks, weights, experts_of_rank)


def draw_pairs(scenario: str, rng: np.random.Generator, shape: tuple[int, int], top_k: int, ranks: int) -> np.ndarray:
    """The chosen pairs (P N, M)."""
    tokens, count = shape
    if scenario in ("any pairs", "no pairs"):
        return rng.random(shape) < (rng.random() if scenario == "any pairs" else 0.0)
    scores = rng.random(shape)
    if scenario in ("one expert for all", "few experts"):
        scores, top_k = np.tile(scores[:1], (tokens, 1)), 1 if scenario == "one expert for all" else top_k
    if scenario == "one rank for all":
        local = count // ranks
        scores[:, local * int(rng.integers(ranks)) :][:, :local] += 1
        top_k = min(top_k, local)
    return scores >= np.sort(scores, axis=1)[:, -top_k][:, None]


class Inputs(NamedTuple):
    """Leaves in float64: tokens `z` (P N, D), `weights` (depth, P N, M), stacks of all experts, and a cotangent of z."""

    z: Tensor
    weights: Tensor
    stacks: list[dict[str, Tensor]]
    cotangent: Tensor


def draw_inputs(drawn: Drawn, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, count, hidden = sum(drawn.tokens), drawn.config.count, 2 * WIDTH

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = {"w1": (WIDTH, hidden), "b1": (hidden,), "w2": (hidden, WIDTH), "b2": (WIDTH,)}
    stacks = [{name: normal(count, *shape) for name, shape in shapes.items()} for _ in drawn.chosen]
    weights = torch.from_numpy(np.stack(drawn.weights)).requires_grad_()
    return Inputs(normal(tokens, WIDTH), weights, stacks, normal(tokens, WIDTH).detach())


def run_dense(drawn: Drawn, inputs: Inputs) -> Tensor:
    """(P N, D): every expert on every token, weighted, where it was chosen."""
    z = inputs.z
    for chosen, weights, stack in zip(drawn.chosen, inputs.weights, inputs.stacks, strict=True):
        gates = weights * torch.from_numpy(chosen)
        mixed = torch.stack([gates[:, j, None] * one_expert(stack, j, z) for j in range(drawn.config.count)]).sum(0)
        z = z + torch.tanh(mixed)
    return z


class Block(nn.Module):
    """A block of the exchanged form, as a layer of the model: the unit of activation checkpointing."""

    def __init__(self, index: int, experts: nn.Module) -> None:
        super().__init__()
        self.index, self.experts = index, experts

    def forward(
        self, z: Tensor, weights: Tensor, chosen: Tensor, limit: int | None, forward_pass: ExchangedTokenPass
    ) -> Tensor:
        routes = TokenRoutes(weights, chosen, torch.zeros(1), False, limit)  # one sample
        dispatched = forward_pass.dispatch(self.index, z, routes, self.experts)  # type: ignore[arg-type]
        return z + torch.tanh(forward_pass.combine(forward_pass.compute(dispatched)))


def check_routing(seed: int, comm: Comm) -> dict[str, Any]:
    """Errors of this rank's results and gradients over the largest true value, and bytes beyond those of the routes."""
    drawn = draw(seed, comm.world)
    truth, mine = draw_inputs(drawn, seed), draw_inputs(drawn, seed)
    expected = run_dense(drawn, truth)
    (expected * truth.cotangent).sum().backward()
    group = group_of(comm, drawn.ranks, drawn.overlap)
    first = sum(drawn.tokens[: group.ep_rank])
    own = slice(first, first + drawn.tokens[group.ep_rank])
    held = drawn.experts_of_rank[group.ep_rank]
    experts = [sharded_rows(drawn.config, stack, held, drawn.ranks) for stack in mine.stacks]
    for each in experts:
        each.place(drawn.experts_of_rank, group.ep_rank)
    blocks: list[nn.Module] = [Block(index, each) for index, each in enumerate(experts)]
    if drawn.recompute:
        blocks = [checkpoint_wrapper(block) for block in blocks]
    z = mine.z.detach()[own].requires_grad_()
    weights = mine.weights.detach()[:, own].requires_grad_()
    forward_pass, out = ExchangedTokenPass(group, is_bounded=drawn.limit is not None), z
    for index, block in enumerate(blocks):
        out = block(out, weights[index], torch.from_numpy(drawn.chosen[index][own]), drawn.limit, forward_pass)
    (out * mine.cotangent[own]).sum().backward()
    assert truth.z.grad is not None and truth.weights.grad is not None
    rows = torch.from_numpy(held)
    errors = {
        "output": error(out.detach(), expected.detach()[own]),
        "tokens": error(z.grad, truth.z.grad[own]),
        "weights": error(weights.grad, truth.weights.grad[:, own]),
        "experts": max(
            error(parameter.grad, stack[name].grad[rows])
            for stack, each in zip(truth.stacks, experts, strict=True)
            for name, parameter in each.named_parameters()
        ),
    }
    sizes, _ = group.traffic.take()
    return {"errors": errors, "surplus_bytes": sizes["tokens"] - routed_bytes(drawn, group.ep_rank)}


def routed_bytes(drawn: Drawn, ep_rank: int) -> int:
    """What a rank sends for the routes of a group: each token once to each other rank that serves it, and back."""
    local = drawn.config.count // drawn.ranks
    source = np.repeat(np.arange(drawn.ranks), drawn.tokens)
    total = 0
    for chosen in drawn.chosen:
        by_rank = chosen[:, drawn.experts_of_rank.ravel()].reshape(-1, drawn.ranks, local)
        served = by_rank.any(2) & (source[:, None] != np.arange(drawn.ranks))
        sent, received = served[source == ep_rank].sum(), served[:, ep_rank].sum()
        if drawn.limit is not None:
            sent = received = (drawn.ranks - 1) * min(drawn.tokens[0], local * drawn.limit)
        forward = sent * (WIDTH + local) + received * WIDTH
        backward = sent * WIDTH + received * (WIDTH + local)
        counts = (drawn.ranks - 1) * (1 + local) if drawn.limit is None else 0
        total += BYTES * int(forward * (1 + drawn.recompute) + backward + counts)
    return total


def main() -> None:
    torch.set_num_threads(1)
    folder, first, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with Comm(find_rank(os.environ), timeout_seconds=60) as comm:
        found = []
        for seed in range(first, stop):
            print(f"routing {seed}", flush=True)  # the last line of a rank that hangs
            ranks = comm.gather(check_routing(seed, comm))
            worst = {key: max(rank["errors"][key] for rank in ranks) for key in ranks[0]["errors"]}
            drawn = draw(seed, comm.world)
            facts = {"scenario": drawn.scenario, "recompute": drawn.recompute, "bounded": drawn.limit is not None}
            found.append({**facts, "errors": worst, "surplus_bytes": [rank["surplus_bytes"] for rank in ranks]})
        dist.barrier()
        if comm.is_first:
            (folder / "routings.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
