"""Token-routed expert layers: ours against DeepSpeed's `MoE` with the same experts and tokens. Rows of `moe.py --token-routed`.

B samples per rank of L tokens and width D, P ranks, M experts. Both gates are random and see random tokens, so that the loads
of experts are nearly even. Ours limits the tokens of an expert per sample, DeepSpeed's per batch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product

import torch
from deepspeed.moe.layer import MoE
from moe_peers import TOP_K, Case, Layer
from torch import Tensor, nn

from sdit.config import MoeConfig
from sdit.distributed.comm import Comm
from sdit.expert_parallel.all_to_all import ExpertGroup
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.token_exchange import ExchangedTokenPass
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.token_gate import TokenGate

TOKENS, EXPERTS = 256, 8
CAPACITIES = (None, 1.25)
HEAD = (
    "ranks", "size", "capacity", "ours, ms", "DeepSpeed, ms", "CPU time, ours / DeepSpeed's", "time, ours / DeepSpeed's",
    "MB sent: ours / DeepSpeed's", "peak MB: ours / DeepSpeed's",
)  # fmt: skip


def exchanged_layer(case: Case, comm: Comm, capacity: float | None, is_bounded: bool = False) -> Layer:
    """Our layer: the gate, the exchange and the experts. `is_bounded`: buffers of the capacity, without a count exchange."""
    torch.manual_seed(3)
    config = MoeConfig(experts=EXPERTS, top_k=TOP_K, kind="mlp", capacity_factor=capacity)
    group = ExpertGroup.create(comm, case.ranks, overlap=True)
    gate = TokenGate(case.width, config)
    nn.init.normal_(gate.weight, std=case.width**-0.5)
    local = EXPERTS // case.ranks
    stack = build_token_experts(config, case.width, range(comm.rank * local, (comm.rank + 1) * local))
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.02)
    experts = ShardedExperts(stack, EXPERTS, case.ranks)

    def forward(x: Tensor) -> Tensor:
        routes = gate(x)[1]
        tokens = ExchangedTokenPass(group, is_bounded)
        return tokens.combine(tokens.compute(tokens.dispatch(0, x.flatten(0, 1), routes, experts))).view_as(x)

    name = "bounded" if is_bounded else "ours"
    return Layer(name, forward, [*experts.parameters(), *gate.parameters()])


def deepspeed_layer(case: Case, capacity: float | None) -> Layer:
    """DeepSpeed's layer. Without a capacity it drops no token, and pads all experts to the fullest one."""
    torch.manual_seed(3)
    hidden = 4 * case.width
    expert = nn.Sequential(nn.Linear(case.width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, case.width))
    layer = MoE(
        case.width, expert, EXPERTS, ep_size=case.ranks, k=TOP_K, drop_tokens=capacity is not None,
        capacity_factor=capacity or 1.0,
    )  # fmt: skip
    layer.set_deepspeed_parallelism()
    return Layer("DeepSpeed", lambda x: layer(x)[0], list(layer.parameters()))


def compare_tokens(options: argparse.Namespace, comm: Comm) -> None:
    """Print the lines of the table of this number of ranks, on rank 0."""
    from moe import SIZES, race

    cases = list(product(SIZES if options.size is None else (options.size,), CAPACITIES))
    for size, capacity in cases[:1] if options.quick else cases:
        case = Case(size, EXPERTS, "mlp", options.batch // comm.world, comm.world)
        torch.manual_seed(10 + comm.rank)
        x = torch.randn(case.batch, TOKENS, case.width, requires_grad=True)
        makers: list[Callable[[], Layer]] = [
            lambda case=case, capacity=capacity: exchanged_layer(case, comm, capacity),  # type: ignore[misc]
            lambda case=case, capacity=capacity: deepspeed_layer(case, capacity),  # type: ignore[misc]
        ]
        ours, theirs = race([make() for make in makers], x, torch.randn_like(x), options.rounds, comm)
        if comm.is_first:
            cells = [
                str(case.ranks), size, "none" if capacity is None else f"{capacity:g}",
                *(f"{1e3 * statistics.median(each.seconds):.0f}" for each in (ours, theirs)),
                _ratio(ours.cpu_seconds, theirs.cpu_seconds), _ratio(ours.seconds, theirs.seconds),
                _pair(ours.sent_bytes, theirs.sent_bytes), _pair(ours.peak_bytes, theirs.peak_bytes),
            ]  # fmt: skip
            print(line(cells), flush=True)


def heading(options: argparse.Namespace) -> str:
    """The heads of the table."""
    return "\n".join(
        (
            f"{options.batch} samples of {TOKENS} tokens over all ranks, M = {EXPERTS}, k = {TOP_K}, float32, 1 thread per "
            f"rank, medians of {options.rounds} rounds",
            line(HEAD),
            line(["---"] * len(HEAD)),
        )
    )


def line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Median over rounds of the ratio within a round."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


def _pair(ours: float, theirs: float) -> str:
    return f"{ours / 1e6:.1f} / {theirs / 1e6:.1f} = {ours / theirs:.2f}"
