"""Ranks meet the same transfers, and their gradients are ready in the same order: the one in which they fill ZeRO's buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdit.config import ModelConfig
from sdit.model import DiffusionTransformer, build_model
from sdit.model.moe.experts import build_experts
from sdit.model.moe.placement import Layout
from sdit.model.moe.plan import MicroPlan, PartPlan, part_rows, plan_blocks
from sdit.parallel.dispatch import ExchangeDispatcher
from sdit.parallel.exchange import Traffic, Wire
from sdit.parallel.experts import SpreadExperts

RANKS, COUNT, PER_RANK, DEPTH = 2, 4, 4, 3
ROUTES = {  # the two experts of every sample: experts 0 and 1 sit on rank 0
    "all travel": [[2, 3]] * PER_RANK + [[0, 1]] * PER_RANK,
    "none travels": [[0, 1]] * PER_RANK + [[2, 3]] * PER_RANK,
    "one travels": [[0, 1]] * (PER_RANK - 1) + [[0, 2]] + [[2, 3]] * PER_RANK,
    "one rank is idle": [[0, 1]] * 2 * PER_RANK,
    "all are dropped": [[0, 2]] * 2 * PER_RANK,
}
AT_HAND = {"none": [], "one": [0], "one of the other rank": [3], "all": [0, 1, 2, 3]}


@dataclass(frozen=True)
class SilentWire(Wire):
    """Sends nothing, and receives zeros; notes what it is asked for."""

    log: list[str] = field(default_factory=list)

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        self.log.append(f"send {mode}")
        return rows.new_zeros((sum(receive_splits), *rows.shape[1:])), mode

    def wait(self, work: Any) -> None:
        self.log.append(f"wait {work}")


def spread_model(kind: str) -> DiffusionTransformer:
    torch.manual_seed(0)
    experts = {"count": COUNT, "top_k": 2, "kind": kind}
    config = ModelConfig.model_validate(
        {"depth": DEPTH, "width": 16, "heads": 2, "patch_size": 4, "input_size": 8, "channels": 1, "experts": experts}
    )
    model = build_model(config)
    for router in model.routers:
        local = build_experts(config.experts, config.width, [0, 1])
        for parameter in local.parameters():
            nn.init.normal_(parameter, std=0.1)
        router.experts = SpreadExperts(local, COUNT, RANKS)  # type: ignore[union-attr]
    return model


def step_log(place: int, kind: str, routes: str, at_hand: str, halves: bool, ahead: bool) -> list[str]:
    """What the rank at `place` does in a step: transfers, attention and MLP, and parameters whose gradients are ready."""
    model, wire = spread_model(kind), SilentWire(None, place, RANKS, True, Traffic())
    hand = np.zeros((DEPTH, COUNT), dtype=bool)
    hand[:, AT_HAND[at_hand]] = True
    layout, experts = Layout(np.tile([0, 0, 1, 1], (DEPTH, 1)), hand, RANKS), np.tile(ROUTES[routes], (DEPTH, 1, 1))
    kept = np.zeros(experts.shape, dtype=bool) if routes == "all are dropped" else None
    parts = tuple(
        PartPlan(rows, plan_blocks(experts, kept, layout, place, rows)) for rows in part_rows(PER_RANK, halves)
    )
    samples, own = np.arange(RANKS * PER_RANK), slice(place * PER_RANK, (place + 1) * PER_RANK)
    dispatcher = ExchangeDispatcher(wire)
    if ahead:
        dispatcher.look_ahead([router.experts for router in model.routers])  # type: ignore[misc]
    dispatcher.follow(MicroPlan(samples, samples, own, experts, kept, None, parts), layout, torch.device("cpu"))
    model.dispatcher = dispatcher
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: wire.log.append(f"attention {index}"))
        block.mlp.register_forward_hook(lambda *_, index=index: wire.log.append(f"mlp {index}"))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: wire.log.append(f"ready {name}"))
    output = model(torch.randn(PER_RANK, 1, 8, 8), torch.arange(PER_RANK), torch.zeros(PER_RANK, dtype=torch.int64))
    output.prediction.sum().backward()
    assert len(ready(wire.log)) == len(list(model.parameters()))
    return wire.log


def ready(log: Sequence[str]) -> list[str]:
    return [entry for entry in log if entry.startswith("ready")]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("at_hand", AT_HAND)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_ranks_of_a_group_do_the_same_and_groups_fill_their_buckets_alike(
    kind: str, at_hand: str, halves: bool, ahead: bool
) -> None:
    logs = {routes: step_log(0, kind, routes, at_hand, halves, ahead) for routes in ROUTES}
    for routes, log in logs.items():
        assert step_log(1, kind, routes, at_hand, halves, ahead) == log, routes
        assert ready(log) == ready(logs["all travel"]), routes


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_travel_while_the_block_before_is_computed(ahead: bool) -> None:
    log = step_log(0, "linear", "none travels", "all", halves=False, ahead=ahead)
    forward = log[: log.index("mlp 2") + 1]
    transfer, compute = ["send weights", "wait weights"], [[f"attention {i}", f"mlp {i}"] for i in range(DEPTH)]
    if ahead:
        late = [entry for block in compute[:-1] for entry in ("send weights", *block, "wait weights")]
        assert forward == [*transfer, *late, *compute[-1]]
    else:
        assert forward == [entry for block in compute for entry in (*transfer, *block)]


def test_halves_send_and_serve_while_the_other_half_is_computed() -> None:
    log = step_log(0, "linear", "all travel", "none", halves=True, ahead=False)
    forward = log[: log.index("mlp 2", log.index("mlp 2") + 1) + 1]
    away, serve, home = ["send tokens"], ["wait tokens", "send tokens"], ["wait tokens"]
    turns = []
    for block in range(DEPTH):
        begin = away if block + 1 < DEPTH else []
        # The first half's way out of block 0 and the last one's way home have nothing before or after them to hide behind.
        turns += [*(serve if block == 0 else []), *home, f"attention {block}", *serve, f"mlp {block}", *begin]
        turns += [*home, f"attention {block}", *(serve if begin else []), f"mlp {block}", *begin]
    assert forward == [*away, *away, *turns]
