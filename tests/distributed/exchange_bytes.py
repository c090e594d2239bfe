"""A job of the exchange worker: bytes on the group at the shapes of S/2, ours and those of DeepSpeed's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.config import Config, ExpertsConfig, ParallelConfig, ResolvedRun
from sdit.contracts import Batch
from sdit.diffusion import build_objective
from sdit.distributed.comm import Comm
from sdit.expert_parallel.all_to_all import MODES
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.placement import ExpertPlacement, place_experts
from sdit.expert_parallel.routing_table import RoutingTable, load_max_over_mean
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.step_planner import gate_tasks
from sdit.expert_parallel.strategy import decide_placement
from sdit.expert_parallel.traffic_model import TrafficModel, UnitCosts, expert_parameters, rank_work
from sdit.model.moe.experts import build_experts
from sdit.model.moe.gate import sparse_gates
from sdit.planner.layout import plan_job
from sdit.planner.traffic import plan_exchange, prior_routes
from sdit.topology import plan_batch
from tests.distributed.exchange_state import model_config

S2_DEPTH, S2_COUNT, S2_TOP_K, S2_WIDTH, S2_TOKENS = 12, 16, 2, 384, 256
LATENT = (4, 32, 32)
LAWS: list[dict[str, Any]] = [
    {"timestep_sampling": "uniform"},
    {"timestep_sampling": "logit_normal", "time_shift": 3.0},
    {"timestep_sampling": "stratified_logit_normal", "logit_mean": -0.5, "logit_std": 0.8},
]
LAW_STEPS, LAW_BATCH = 12, 64
LAW_CONFIG: dict[str, Any] = {
    "model": {
        "depth": S2_DEPTH, "width": S2_WIDTH, "heads": 6, "learn_variance": False,
        "experts": {"count": S2_COUNT, "top_k": S2_TOP_K},
    },
    "train": {"steps": 1, "global_batch": LAW_BATCH},
    "sample": {"sampler": "euler"},
}  # fmt: skip
S2_EXPERTS = ExpertsConfig(count=S2_COUNT, top_k=S2_TOP_K)
SMALL = 4  # width of what really travels in the byte counts; a row is one token of it


def measured_bytes(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """Bytes of S/2 with 16 experts on all ranks together, sent for random and for learned routes."""
    return bytes_of_batches(comm, folder, seed=0)


def more_measured_bytes(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """The same for another batch."""
    return bytes_of_batches(comm, folder, seed=1)


def bytes_of_batches(comm: Comm, folder: Path, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    order = np.argsort(rng.random((S2_DEPTH, 1000, S2_COUNT)), axis=2)[:, :, :S2_TOP_K]
    stored = np.load(folder / "learned.npz")
    routes = {"random": RoutingTable(order, np.tile(np.float32([0.6, 0.3]), (S2_DEPTH, 1000, 1)), S2_COUNT)}
    routes["learned"] = RoutingTable(stored["experts"], stored["gates"], S2_COUNT)
    found = []
    for name, per_rank in (("random", 16), ("learned", 16), ("learned", 64)):
        tasks = np.random.default_rng(seed).integers(0, 1000, per_rank * comm.world)
        row = {"routes": name, "per_rank": per_rank, "seed": seed, "stock": stock_bytes(comm, routes[name], tasks)}
        row["tokens"], _ = our_bytes(comm, routes[name], tasks, "tokens", "index", "order")
        row["auto"], row["load_imbalance"] = our_bytes(comm, routes[name], tasks, "auto", "path", "path")
        found.append(row)
    return found


def our_bytes(
    comm: Comm, routes: RoutingTable, tasks: np.ndarray, exchange: str, placement: str, seating: str
) -> tuple[float, float]:
    """Bytes counted on the group, tokens and weights scaled to S/2, and the work of the most loaded rank over the mean."""
    ranks, per_rank = comm.world, len(tasks) // comm.world
    parallel = ParallelConfig(expert=ranks, exchange=exchange, placement=placement, seating=seating)
    traffic = TrafficModel(routes, ranks, per_rank, seating)  # type: ignore[arg-type]
    placed = placement_for(routes, traffic, s2_costs(ranks), exchange, placement)
    sizes, load_imbalance = placed_bytes(comm, routes, tasks, parallel, placed)
    return sum(sizes.values()), load_imbalance


def s2_costs(ranks: int) -> UnitCosts:
    return UnitCosts(4 * S2_TOKENS * S2_WIDTH, 4 * expert_parameters(S2_EXPERTS, S2_WIDTH), ranks)


def placed_bytes(
    comm: Comm, routes: RoutingTable, tasks: np.ndarray, parallel: ParallelConfig, placement: ExpertPlacement
) -> tuple[dict[str, float], float]:
    """Bytes by mode of one step on all ranks under a placement, scaled to S/2, and the work of the most loaded rank."""
    ranks, per_rank = comm.world, len(tasks) // comm.world
    model = model_config(SMALL, "linear", S2_COUNT, S2_DEPTH)
    batch = plan_batch(len(tasks), per_rank, comm.world)
    config = Config(model=model, parallel=parallel)
    experts = TableExpertParallel(routes, ResolvedRun(config, {}, batch, ranks, comm.world, 0), comm)
    experts.placed.placement = placement
    experts.begin_step(0, tasks)
    own = np.arange(comm.rank, len(tasks), comm.world)
    image, number = torch.zeros(per_rank, *LATENT), torch.zeros(per_rank, dtype=torch.int64)
    experts.begin_micro_step(0, Batch(torch.from_numpy(own), image, image, number, number))
    forward_pass = experts.forward_pass(torch.zeros(per_rank, dtype=torch.int64))
    view = forward_pass.view
    assert view.experts is not None
    probs = torch.full((S2_DEPTH, len(tasks), S2_COUNT), 0.5, requires_grad=True)
    gates = sparse_gates(probs, view.experts, view.kept)
    z = torch.zeros(per_rank, 1, SMALL, requires_grad=True)
    outputs = []
    for block in range(S2_DEPTH):
        ids = experts.placed.placement.experts_of_rank[block, experts.group.ep_rank].tolist()
        stack = ShardedExperts(build_experts(model.experts, SMALL, ids), S2_COUNT, ranks)
        computed = forward_pass.compute(forward_pass.dispatch(block, z, gates[block], stack))
        outputs.append(forward_pass.combine(computed))
    torch.stack(outputs).sum().backward()
    sizes, _ = experts.group.traffic.take()
    scale = {
        "tokens": S2_TOKENS * S2_WIDTH / SMALL,
        "samples": 1,
        "weights": s2_costs(ranks).expert_bytes / 4 / expert_parameters(S2_EXPERTS, SMALL),
    }
    total = comm.sum(torch.tensor([sizes.get(mode, 0) * scale[mode] for mode in MODES], dtype=torch.float64))
    load_imbalance = load_max_over_mean(rank_work(view.experts.numpy(), placement)).mean()
    return dict(zip(MODES, total.tolist(), strict=True)), float(load_imbalance)


def bytes_under_a_law(comm: Comm, folder: Path) -> list[dict[str, Any]]:
    """Bytes of experts that S/2 sends per step for the routes of the prior: as planned, and measured for drawn times."""
    found = []
    for law in LAWS:
        config = Config.model_validate({**LAW_CONFIG, "diffusion": {"path": "flow", **law}})
        job = plan_job(config, {"zero_optimization": {"stage": 1}}, "case", comm.world, comm.world)
        planned, routes = plan_exchange(job, "prior"), prior_routes(job)
        assert planned is not None
        objective = build_objective(config.diffusion, config.model.timesteps)
        parallel = config.parallel
        traffic = TrafficModel(routes, comm.world, job.batch.micro_batch, parallel.seating)
        for mode in ("tokens", "auto"):
            choice = decide_placement(parallel.placement, mode, traffic, s2_costs(comm.world))  # type: ignore[arg-type]
            steps = []
            for step in range(LAW_STEPS):
                times = objective.draw_timesteps(config.seed, step * LAW_BATCH, LAW_BATCH)
                tasks = gate_tasks(times, config.model.timesteps)
                sizes, _ = placed_bytes(comm, routes, tasks, parallel, choice.placement)
                steps.append(sizes["tokens"] + sizes["weights"])
            measured = float(np.mean(steps))
            found.append({"law": law, "mode": mode, "planned": planned.step_bytes[mode], "measured": measured})  # type: ignore[index]
    return found


class TableExpertParallel(ExpertParallel):
    """Expert parallelism by a given routing table."""

    def __init__(self, table: RoutingTable, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given = table

    @property
    def table(self) -> RoutingTable:
        return self._given


def placement_for(
    routes: RoutingTable, traffic: TrafficModel, costs: UnitCosts, exchange: str, placement: str
) -> ExpertPlacement:
    if exchange == "tokens":
        place = place_experts(placement, routes, traffic.ranks)  # type: ignore[arg-type]
        return ExpertPlacement(place, np.zeros(place.shape, dtype=bool), traffic.ranks)
    return decide_placement(placement, exchange, traffic, costs).placement  # type: ignore[arg-type]


def stock_bytes(comm: Comm, routes: RoutingTable, tasks: np.ndarray) -> float:
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
