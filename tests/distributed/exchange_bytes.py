"""A job of the exchange worker: bytes on the wire at the shapes of S/2, ours and those of DeepSpeed's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.config import Config, ParallelConfig, TrainConfig
from sdit.contracts import RawBatch
from sdit.model.moe.choice import decide_layout
from sdit.model.moe.experts import build_experts
from sdit.model.moe.gate import sparse_gates
from sdit.model.moe.placement import Layout, place_experts
from sdit.model.moe.routes import Routes, load_max_over_mean
from sdit.model.moe.traffic import Costs, Practice, expert_parameters, rank_work
from sdit.parallel.comm import Comm
from sdit.parallel.experts import SpreadExperts
from sdit.parallel.spread import ExpertSpread
from sdit.topology import plan_batch
from tests.distributed.exchange_state import model_config

S2_DEPTH, S2_COUNT, S2_TOP_K, S2_WIDTH, S2_TOKENS = 12, 16, 2, 384, 256
LATENT = (4, 32, 32)
SMALL = 4  # width of what really travels in the byte counts; a row is one token of it


def measured_bytes(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """Bytes of S/2 with 16 experts on all ranks together, sent for random and for learned routes."""
    rng = np.random.default_rng(5)
    order = np.argsort(rng.random((S2_DEPTH, 1000, S2_COUNT)), axis=2)[:, :, :S2_TOP_K]
    stored = np.load(folder / "learned.npz")
    routes = {"random": Routes(order, np.tile(np.float32([0.6, 0.3]), (S2_DEPTH, 1000, 1)), S2_COUNT)}
    routes["learned"] = Routes(stored["experts"], stored["gates"], S2_COUNT)
    found = []
    for name, per_rank in (("random", 16), ("learned", 16), ("learned", 64)):
        for seed in range(2):
            tasks = np.random.default_rng(seed).integers(0, 1000, per_rank * comm.world)
            row = {"routes": name, "per_rank": per_rank, "seed": seed, "stock": stock_bytes(comm, routes[name], tasks)}
            row["tokens"], _ = our_bytes(comm, routes[name], tasks, "tokens", "index", "order")
            row["auto"], row["fullest"] = our_bytes(comm, routes[name], tasks, "auto", "path", "path")
            found.append(row)
    return found


def our_bytes(
    comm: Comm, routes: Routes, tasks: np.ndarray, exchange: str, placement: str, seating: str
) -> tuple[float, float]:
    """Bytes counted on the wire, tokens and weights scaled to S/2, and the fullest rank's work over the mean."""
    ranks, per_rank = comm.world, len(tasks) // comm.world
    parallel = ParallelConfig(expert=ranks, exchange=exchange, placement=placement, seating=seating)
    model = model_config(SMALL, "linear", S2_COUNT, S2_DEPTH)
    batch = plan_batch(len(tasks), per_rank, comm.world)
    spread = ExpertSpread(
        Config(model=model, parallel=parallel, train=TrainConfig(global_batch=len(tasks))), batch, comm, ranks
    )
    expert_bytes = 4 * expert_parameters("linear", S2_WIDTH, 0)
    costs = Costs(4 * S2_TOKENS * S2_WIDTH, expert_bytes, ranks)
    spread.layout = layout_for(routes, Practice(routes, ranks, per_rank, seating), costs, exchange, placement)
    spread.begin_step(routes, 0, tasks)
    own = np.arange(comm.rank, len(tasks), comm.world)
    spread.begin_micro_step(
        0, RawBatch(own, np.zeros((per_rank, *LATENT), dtype=np.float32), np.zeros(per_rank, dtype=np.int64))
    )
    view = spread.dispatcher.view(torch.zeros(per_rank, dtype=torch.int64))
    assert view.experts is not None
    probs = torch.full((S2_DEPTH, len(tasks), S2_COUNT), 0.5, requires_grad=True)
    gates = sparse_gates(probs, view.experts, view.kept)
    z = torch.zeros(per_rank, 1, SMALL, requires_grad=True)
    for block in range(S2_DEPTH):
        local = build_experts(model.experts, SMALL, spread.layout.slots[block, spread.place].tolist())
        spread.dispatcher.start(block, z, gates[block], SpreadExperts(local, S2_COUNT, ranks)).wait().sum().backward(
            retain_graph=True
        )
    sizes, _ = spread.traffic.take()
    scale = {
        "tokens": S2_TOKENS * S2_WIDTH / SMALL,
        "seats": 1,
        "weights": expert_bytes / 4 / expert_parameters("linear", SMALL, 0),
    }
    total = comm.sum(torch.tensor(sum(size * scale[mode] for mode, size in sizes.items()), dtype=torch.float64))
    return float(total), float(load_max_over_mean(rank_work(view.experts.numpy(), spread.layout)).mean())


def layout_for(routes: Routes, practice: Practice, costs: Costs, exchange: str, placement: str) -> Layout:
    if exchange == "tokens":
        place = place_experts(placement, routes, practice.ranks)  # type: ignore[arg-type]
        return Layout(place, np.zeros(place.shape, dtype=bool), practice.ranks)
    return decide_layout(placement, exchange, practice, costs).layout  # type: ignore[arg-type]


def stock_bytes(comm: Comm, routes: Routes, tasks: np.ndarray) -> float:
    """Bytes that leave ranks in DeepSpeed's own MoE layer, dropless, forward and backward, for the same routes.

    Counted on its all-to-alls with one token a sample: all tokens of a sample share a route, so that bytes grow with L.
    """
    from deepspeed import comm as deepspeed_comm
    from deepspeed.moe.layer import MoE

    sent = 0
    plain = deepspeed_comm.all_to_all_single

    def counting(output: Tensor, input: Tensor, *args: Any, **more: Any) -> Any:
        nonlocal sent
        sent += input.numel() * input.element_size() * (comm.world - 1) // comm.world
        return plain(output, input, *args, **more)

    own = tasks[comm.rank :: comm.world]
    deepspeed_comm.all_to_all_single = counting
    try:
        for chosen in routes.experts:
            # A sample's token is its logits, and the gate the identity: the two chosen experts come out first.
            preference = torch.tensor([[4.0, 2.0]]).expand(len(own), -1)
            tokens = torch.zeros(len(own), S2_COUNT).scatter(1, torch.from_numpy(chosen[own]), preference)
            expert = torch.nn.Linear(S2_COUNT, S2_COUNT)
            dropless = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
            layer = MoE(S2_COUNT, expert, S2_COUNT, comm.world, k=S2_TOP_K, **dropless)
            layer.set_deepspeed_parallelism()
            layer.deepspeed_moe.gate.wg.weight.data.copy_(torch.eye(S2_COUNT))
            out, _, counts = layer(tokens.requires_grad_())
            assert counts.tolist() == np.bincount(chosen[own].ravel(), minlength=S2_COUNT).tolist()
            out.sum().backward()
    finally:
        deepspeed_comm.all_to_all_single = plain
    return float(comm.sum(torch.tensor(sent, dtype=torch.float64))) * S2_TOKENS * S2_WIDTH / S2_COUNT
