"""The expert layers that `moe.py` compares: ours by mode of exchange, ours without exchange, DeepSpeed's, fairscale's.

B samples per rank of L tokens and width D, P ranks, M experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from fairscale.nn.moe import MOELayer, Top2Gate  # type: ignore[import-untyped]
from torch import Tensor, nn

from sdit.config import SIZES, Config, ExpertsConfig, ModelConfig, ParallelConfig, ResolvedRun, TrainConfig
from sdit.contracts import Batch, ForwardPass
from sdit.distributed.comm import Comm
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.expert_parallel.routing_table import RoutingTable
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.model.moe.base import Experts
from sdit.model.moe.experts import build_experts
from sdit.model.moe.gate import gate_probabilities, sparse_gates
from sdit.model.moe.local import LocalDispatcher
from sdit.topology import plan_batch

TOP_K = 2  # the only k that fairscale's gate knows
TASKS = 1000
DRAWS = 20_000  # of a global batch. With 4 ranks about one of 1000 has even routes


@dataclass(frozen=True)
class Case:
    """One line of the comparison: a model size, M experts of a kind, B samples per rank, P ranks.

    `is_even`: each rank owns the experts of as many (sample, expert) pairs as any other, in each global batch of our layers.
    """

    size: Literal["S/2", "B/2"]
    experts: int
    kind: Literal["linear", "mlp"]
    batch: int
    ranks: int
    is_even: bool = False

    @property
    def width(self) -> int:
        return SIZES[self.size[0]][1]

    def config(self, exchange: Literal["auto", "tokens", "weights"]) -> Config:
        """A model of one block on all ranks. Random routes, index placement and no assignment of samples: the exchange only."""
        experts = ExpertsConfig(count=self.experts, top_k=TOP_K, kind=self.kind)
        heads = SIZES[self.size[0]][2]
        return Config(
            model=ModelConfig(depth=1, width=self.width, heads=heads, patch_size=2, timesteps=TASKS, experts=experts),
            parallel=ParallelConfig(expert=self.ranks, exchange=exchange, placement="index", seating="order"),
            train=TrainConfig(steps=1, global_batch=self.batch * self.ranks),
        )


@dataclass(frozen=True)
class Layer:
    """A layer to time: `forward` maps tokens (B, L, D) to (B, L, D); `reduces` if gradients of its experts are summed over
    all ranks; `replicated` experts come to the samples."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    reduces: bool = False
    replicated: int = 0

    def step(self, z: Tensor, grad: Tensor) -> None:
        """Forward and backward, and the all-reduce that data parallelism needs where every rank holds all experts."""
        self.forward(z).backward(grad)
        if self.reduces:
            dist.all_reduce(torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]))

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class TaskGate:
    """A gate on random task embeddings (T, D), hence random routes; draws the same tasks on all ranks."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(1)
        self.linear = nn.Linear(case.width, case.experts)
        nn.init.normal_(self.linear.weight, std=case.width**-0.5)
        nn.init.zeros_(self.linear.bias)  # the gate of DeepSpeed has none
        self.table = torch.randn(TASKS, case.width)
        top = gate_probabilities(self.table, [self.linear]).detach().topk(TOP_K)
        self.routes = RoutingTable(top.indices.numpy(), top.values.numpy(), case.experts)
        tasks = np.random.default_rng(2).integers(0, TASKS, (DRAWS, case.batch * case.ranks))
        self._batches = cycle(tasks[self._are_even(tasks, case)] if case.is_even else tasks)

    def draw(self) -> np.ndarray:
        """(P B,) tasks of the next global batch."""
        return next(self._batches)

    def _are_even(self, tasks: np.ndarray, case: Case) -> np.ndarray:
        """(n,) bool of global batches of tasks (n, P B), see `Case`. Experts are placed by index."""
        owners = self.routes.experts[0, tasks] * case.ranks // case.experts
        pairs = case.batch * TOP_K
        return np.logical_and.reduce([(owners == rank).sum((1, 2)) == pairs for rank in range(case.ranks)])

    def gates(self, tasks: Tensor, experts: Tensor | None) -> Tensor:
        """(G, M) sparse gates of tasks (G,); `experts` (1, G, k) fixes the choice."""
        probs = gate_probabilities(self.table[tasks], [self.linear])
        return sparse_gates(probs, probs.topk(TOP_K).indices if experts is None else experts)[0]


class GatedExpertParallel(ExpertParallel):
    """Expert parallelism by the routing table of a `TaskGate`, with the replicas that the exchange asks for."""

    def __init__(self, case: Case, comm: Comm, exchange: Literal["auto", "tokens", "weights"], gate: TaskGate) -> None:
        config = case.config(exchange)
        batch = plan_batch(config.train.global_batch, None, case.ranks)
        super().__init__(ResolvedRun(config, {}, batch, case.ranks, case.ranks, 0), comm)
        self._gate = gate
        better = self.rebalancer.better_placement(gate.routes, placement_due=True, is_first=True)
        if better is not None:
            self.placed.placement = better[0]

    @property
    def table(self) -> RoutingTable:
        return self._gate.routes


def sharded_layer(case: Case, comm: Comm, exchange: Literal["auto", "tokens", "weights"]) -> Layer:
    """Our layer. A step holds its plan for the one block, its gates, and the exchange."""
    gate = TaskGate(case)
    parallel = GatedExpertParallel(case, comm, exchange, gate)
    ids = parallel.placed.placement.experts_of_rank[0][parallel.group.ep_rank]
    local = build_experts(case.config(exchange).model.experts, case.width, ids)
    experts = ShardedExperts(_randomised(local), case.experts, case.ranks)
    index = np.arange(comm.rank, case.ranks * case.batch, case.ranks)
    image, number = torch.zeros(case.batch, 1, 1, 1), torch.zeros(case.batch, dtype=torch.int64)
    loaded = Batch(torch.from_numpy(index), image, image, number, number)

    def forward(z: Tensor) -> Tensor:
        tasks = gate.draw()
        parallel.begin_step(0, tasks)
        parallel.begin_micro_step(0, loaded)
        return mixture(parallel.forward_pass(torch.from_numpy(tasks[index])), z, gate, experts)

    replicated = int(parallel.placed.placement.replicated.sum())
    return Layer(exchange, forward, [*experts.parameters(), *gate.linear.parameters()], replicated=replicated)


def mixture(forward_pass: ForwardPass, z: Tensor, gate: TaskGate, experts: nn.Module) -> Tensor:
    """(B, L, D) mixture of tokens z (B, L, D) in one block."""
    gates = gate.gates(forward_pass.view.task, forward_pass.view.experts)
    return forward_pass.combine(forward_pass.compute(forward_pass.dispatch(0, z, gates, experts)))


def local_layer(case: Case, comm: Comm, reduces: bool) -> Layer:
    """EP = 1: every rank holds all experts."""
    gate, dispatcher = TaskGate(case), LocalDispatcher()
    experts = _randomised(build_experts(case.config("auto").model.experts, case.width))

    def forward(z: Tensor) -> Tensor:
        return mixture(
            dispatcher.forward_pass(torch.from_numpy(gate.draw()[comm.rank :: case.ranks])), z, gate, experts
        )

    name = "EP = 1, summed" if reduces else "EP = 1"
    return Layer(name, forward, [*experts.parameters(), *gate.linear.parameters()], reduces)


class DeepSpeedTaskGate(TopKGate):
    """DeepSpeed's gate on the task of a sample instead of its tokens: all tokens of a sample have the experts that our layers
    choose. This is what Switch-DiT on DeepSpeed's `MoE` would need."""

    def __init__(self, case: Case, comm: Comm) -> None:
        super().__init__(case.width, case.experts, TOP_K, drop_tokens=False, top2_2nd_expert_sampling=False)
        self._own, self._gate = slice(comm.rank, None, case.ranks), TaskGate(case)
        self.wg.weight = self._gate.linear.weight

    def forward(self, input: Tensor, *options: Any, **more_options: Any) -> Any:
        """What DeepSpeed's layer wants to know of tokens (B L, D): loss, capacity, routes, gates, counts."""
        embeddings = F.silu(self._gate.table[self._gate.draw()[self._own]])  # as `gate_probabilities` does
        return super().forward(embeddings.repeat_interleave(len(input) // len(embeddings), 0), *options, **more_options)


def deepspeed_layer(case: Case, comm: Comm, by_task: bool) -> Layer:
    """DeepSpeed's layer, dropless. `by_task`: with our routes; else its own gate chooses the experts of each token."""
    torch.manual_seed(3)
    layer = MoE(case.width, _expert(case), case.experts, ep_size=case.ranks, k=TOP_K, drop_tokens=False)
    if by_task:
        layer.deepspeed_moe.gate = DeepSpeedTaskGate(case, comm)
    layer.set_deepspeed_parallelism()
    name = "DeepSpeed" if by_task else "DeepSpeed, by token"
    return Layer(name, lambda z: layer(z)[0], list(layer.parameters()))


def fairscale_layer(case: Case) -> Layer:
    """fairscale's layer; its gate sees tokens and drops those beyond 2 S / M per expert."""
    torch.manual_seed(4)
    expert = _expert(case)
    experts = nn.ModuleList([deepcopy(expert) for _ in range(case.experts // case.ranks)])
    layer = MOELayer(Top2Gate(case.width, case.experts), experts)
    return Layer("fairscale", layer, list(layer.parameters()))


def all_layers(case: Case, comm: Comm) -> list[Layer]:
    """Every layer of the comparison, freshly made."""
    return [
        sharded_layer(case, comm, "auto"),
        sharded_layer(case, comm, "tokens"),
        sharded_layer(case, comm, "weights"),
        local_layer(case, comm, reduces=False),
        local_layer(case, comm, reduces=True),
        deepspeed_layer(case, comm, by_task=True),
        deepspeed_layer(case, comm, by_task=False),
        fairscale_layer(case),
    ]


def _expert(case: Case) -> nn.Module:
    """One expert as the peers take it."""
    if case.kind == "linear":
        return nn.Linear(case.width, case.width)
    return nn.Sequential(
        nn.Linear(case.width, 4 * case.width), nn.GELU(approximate="tanh"), nn.Linear(4 * case.width, case.width)
    )


def _randomised(module: Experts) -> Experts:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module
