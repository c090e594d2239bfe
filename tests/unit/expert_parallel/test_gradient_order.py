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
from sdit.expert_parallel.all_to_all import ExpertGroup, TrafficCounter
from sdit.expert_parallel.device_plan import pack_plan
from sdit.expert_parallel.dispatcher import PlannedPass
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.step_plan import MicroStepPlan, plan_blocks
from sdit.model import DiffusionTransformer, build_model
from sdit.model.moe import mlp_experts
from sdit.model.moe.experts import build_experts

RANKS, COUNT, PER_RANK, DEPTH = 2, 4, 4, 3
ROUTES = {  # the two experts of every sample: experts 0 and 1 sit on rank 0
    "all travel": [[2, 3]] * PER_RANK + [[0, 1]] * PER_RANK,
    "none travels": [[0, 1]] * PER_RANK + [[2, 3]] * PER_RANK,
    "one travels": [[0, 1]] * (PER_RANK - 1) + [[0, 2]] + [[2, 3]] * PER_RANK,
    "one rank is idle": [[0, 1]] * 2 * PER_RANK,
    "all are dropped": [[0, 2]] * 2 * PER_RANK,
}
REPLICATED = {"none": [], "one": [0], "one of the other rank": [3], "all": [0, 1, 2, 3]}


@dataclass(frozen=True)
class SilentGroup(ExpertGroup):
    """Sends nothing and receives zeros. Logs every call."""

    log: list[str] = field(default_factory=list)

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        self.log.append(f"send {mode}")
        return rows.new_zeros((sum(receive_splits), *rows.shape[1:])), mode

    def wait(self, work: Any) -> None:
        self.log.append(f"wait {work}")


def sharded_model(kind: str) -> DiffusionTransformer:
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
        router.experts = ShardedExperts(local, COUNT, RANKS)  # type: ignore[union-attr]
    return model


def step_log(ep_rank: int, kind: str, routes: str, replicated: str, prefetch: bool) -> list[str]:
    """What a rank does in a step: transfers, attention and MLP, and parameters whose gradients are ready."""
    model, group = sharded_model(kind), SilentGroup(None, ep_rank, RANKS, True, TrafficCounter())
    mask = np.zeros((DEPTH, COUNT), dtype=bool)
    mask[:, REPLICATED[replicated]] = True
    placement = ExpertPlacement(np.tile([0, 0, 1, 1], (DEPTH, 1)), mask, RANKS)
    experts = np.tile(ROUTES[routes], (DEPTH, 1, 1))
    kept = np.zeros(experts.shape, dtype=bool) if routes == "all are dropped" else None
    samples, own = np.arange(RANKS * PER_RANK), slice(ep_rank * PER_RANK, (ep_rank + 1) * PER_RANK)
    blocks = plan_blocks(experts, kept, placement, ep_rank)
    plan = MicroStepPlan(samples, samples, own, experts, kept, None, blocks)
    stacks = [router.experts for router in model.routers] if prefetch else []

    class OnePlan:
        def forward_pass(self, task: Tensor) -> PlannedPass:
            return PlannedPass(group, pack_plan(plan, placement, ep_rank).to_device(torch.device("cpu")), stacks)  # type: ignore[arg-type]

    model.dispatcher = OnePlan()
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: group.log.append(f"attention {index}"))
        block.mlp.register_forward_hook(lambda *_, index=index: group.log.append(f"mlp {index}"))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: group.log.append(f"ready {name}"))
    output = model(torch.randn(PER_RANK, 1, 8, 8), torch.arange(PER_RANK), torch.zeros(PER_RANK, dtype=torch.int64))
    output.prediction.sum().backward()
    assert len(ready(group.log)) == len(list(model.parameters()))
    return group.log


def ready(log: Sequence[str]) -> list[str]:
    return [entry for entry in log if entry.startswith("ready")]


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("replicated", REPLICATED)
@pytest.mark.parametrize(("kind", "grouped"), [("linear", False), ("mlp", False), ("mlp", True)])
def test_ranks_of_a_group_do_the_same_and_groups_fill_their_buckets_alike(
    kind: str, grouped: bool, replicated: str, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_experts, "has_grouped_product", lambda *_: grouped)
    logs = {routes: step_log(0, kind, routes, replicated, prefetch) for routes in ROUTES}
    for routes, log in logs.items():
        assert step_log(1, kind, routes, replicated, prefetch) == log, routes
        assert ready(log) == ready(logs["all travel"]), routes


@pytest.mark.parametrize("prefetch", [False, True])
def test_weights_travel_while_the_block_before_is_computed(prefetch: bool) -> None:
    log = step_log(0, "linear", "none travels", "all", prefetch)
    forward = log[: log.index("mlp 2") + 1]
    transfer, compute = ["send weights", "wait weights"], [[f"attention {i}", f"mlp {i}"] for i in range(DEPTH)]
    if prefetch:
        late = [entry for block in compute[:-1] for entry in ("send weights", *block, "wait weights")]
        assert forward == [*transfer, *late, *compute[-1]]
    else:
        assert forward == [entry for block in compute for entry in (*transfer, *block)]
