"""The order in which gradients are ready is the same on all ranks: it is the order in which they fill ZeRO's buckets."""

from __future__ import annotations

from collections.abc import Sequence
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
}
AT_HAND = {"none": [], "one": [0], "one of the other rank": [3], "all": [0, 1, 2, 3]}


class SilentWire(Wire):
    """Sends nothing, and receives zeros."""

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        return rows.new_zeros((sum(receive_splits), *rows.shape[1:])), None


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


def gradient_order(kind: str, routes: str, at_hand: str, halves: bool, ahead: bool) -> list[str]:
    """Names of rank 0's parameters as their gradients become ready."""
    model = spread_model(kind)
    place = np.tile([0, 0, 1, 1], (DEPTH, 1))
    hand = np.zeros(place.shape, dtype=bool)
    hand[:, AT_HAND[at_hand]] = True
    layout, experts = Layout(place, hand, RANKS), np.tile(np.array(ROUTES[routes]), (DEPTH, 1, 1))
    parts = tuple(PartPlan(rows, plan_blocks(experts, None, layout, 0, rows)) for rows in part_rows(PER_RANK, halves))
    samples = np.arange(RANKS * PER_RANK)
    plan = MicroPlan(samples, samples, slice(0, PER_RANK), experts, None, None, parts)
    dispatcher = ExchangeDispatcher(SilentWire(None, 0, RANKS, True, Traffic()))
    if ahead:
        dispatcher.look_ahead([router.experts for router in model.routers])  # type: ignore[misc]
    dispatcher.follow(plan, layout, torch.device("cpu"))
    model.dispatcher = dispatcher
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    output = model(torch.randn(PER_RANK, 1, 8, 8), torch.arange(PER_RANK), torch.zeros(PER_RANK, dtype=torch.int64))
    output.prediction.sum().backward()
    assert len(order) == len(list(model.parameters()))
    return order


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("at_hand", AT_HAND)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_are_ready_in_an_order_that_routes_do_not_change(
    kind: str, at_hand: str, halves: bool, ahead: bool
) -> None:
    orders = {routes: gradient_order(kind, routes, at_hand, halves, ahead) for routes in ROUTES}
    first = orders["all travel"]
    assert [routes for routes, order in orders.items() if order != first] == []
