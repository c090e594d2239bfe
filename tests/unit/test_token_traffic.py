"""The planner's expected bytes of token-routed experts: sent, and kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdit.config import Config, ModelConfig, MoeConfig, TrainConfig, load_config
from sdit.diffusion import build_objective
from sdit.expert_parallel.all_to_all import TrafficCounter
from sdit.expert_parallel.sharded_experts import ShardedExperts
from sdit.expert_parallel.token_exchange import TokenExchange
from sdit.model import DiffusionTransformer, build_model
from sdit.model.moe import token_gate
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.token_moe import TokenMoe
from sdit.planner.layout import DeviceKind, Job, plan_job
from sdit.planner.memory import activation_bytes
from sdit.planner.token_traffic import kept_share, served_share, token_exchange_bytes
from sdit.planner.traffic import plan_exchange
from tests.unit.expert_parallel.test_gradient_order import SilentGroup
from tests.unit.kept_tensors import kept_bytes


@pytest.mark.parametrize(("experts", "top_k", "local"), [(8, 2, 4), (8, 2, 2), (6, 3, 1), (4, 2, 4)])
def test_the_share_of_tokens_is_that_of_all_choices(experts: int, top_k: int, local: int) -> None:
    choices = list(combinations(range(experts), top_k))
    share = sum(min(choice) < local for choice in choices) / len(choices)
    assert served_share(MoeConfig(experts=experts, top_k=top_k), 16, local) == pytest.approx(share)


def test_expert_choice_takes_its_tokens_independently() -> None:
    config = MoeConfig(experts=8, router="expert_choice", capacity_factor=2.0)
    assert served_share(config, 16, 2) == pytest.approx(1 - 0.75**2)


def test_bytes_are_rows_and_sums_of_both_passes() -> None:
    def sent(*overrides: str) -> tuple[float, int]:
        settings = ["train.steps=1", "train.global_batch=8", *overrides]
        job = plan_job(load_config("tests/distributed/tiny.yaml", settings), {}, "test", 2, 2)
        job = replace(job, expert_parallel=2)
        exchange = plan_exchange(job, "random")
        assert exchange is not None
        if job.config.model.variant == "dit":
            assert exchange.step_bytes["auto"] == token_exchange_bytes(job, "cpu")[0] > 0
        return token_exchange_bytes(job, "cpu")

    moe = ("model.variant=dit", "model.moe={experts: 2, top_k: 2}")
    rows = 2 * 4 * 4  # blocks, samples of a rank, tokens: every token is served by the other rank
    row, weight = 32 * 4, 4
    kept = rows * (
        row + 2 * weight + 2 + 2 * 8
    )  # the received token, its weights twice, masks, and indices of the sent one
    assert sent(*moe) == (2 * 2 * rows * (2 * row + weight), kept)
    assert sent(*moe, "parallel.activation_checkpointing=block") == (2 * 3 * rows * (2 * row + weight), 0)
    assert sent() == (0, 0)


BATCH = 4
MOES: dict[str, dict[str, Any]] = {
    "swiglu, shared": {"experts": 4, "shared": 1},
    "mlp": {"experts": 8, "kind": "mlp", "hidden_ratio": 2},
    "expert choice": {"experts": 4, "kind": "mlp", "router": "expert_choice"},
    "every second block": {"experts": 8, "top_k": 3, "every": 2},
}


class MirrorGroup(SilentGroup):
    """The other ranks send to this rank what it sends to them. Counts all bytes, in forward and backward."""

    def send(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], mode: str
    ) -> tuple[Tensor, Any]:
        self.traffic.add(mode, rows.nbytes)
        return rows.clone(), mode


def sharded(config: ModelConfig, ranks: int, traffic: TrafficCounter, is_bounded: bool) -> DiffusionTransformer:
    """A model with the experts of rank 0 of `ranks`, which exchanges tokens with mirrors of itself."""
    torch.manual_seed(0)
    model = build_model(config).train()
    assert config.moe is not None
    local = range(config.moe.experts // ranks)
    for each in model.modules():
        if isinstance(each, TokenMoe):
            experts = build_token_experts(config.moe, config.width, local)
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.02)
            each.experts = ShardedExperts(experts, config.moe.experts, ranks)  # type: ignore[assignment]
    model.token_dispatcher = TokenExchange(MirrorGroup(None, 0, ranks, True, traffic), is_bounded)
    return model


def loss_of(model: DiffusionTransformer) -> Tensor:
    """The loss of a batch of noise."""
    config = model.config
    x = torch.randn(BATCH, config.channels, config.input_size, config.input_size)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    return build_objective({}, config.timesteps)(model, x, torch.arange(BATCH), labels, torch.randn_like(x)).loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("moe", MOES.values(), ids=MOES)
def test_sharded_experts_keep_what_is_planned(
    moe: dict[str, Any], ranks: int, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 4 %: the choices of a new gate are only nearly even, and small tensors are not planned."""
    planned, kept = planned_and_kept(moe, ranks, precision, monkeypatch)
    assert kept == pytest.approx(planned, rel=0.04)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("capacity_factor", [2.0, 1.25, 0.5])
@pytest.mark.parametrize("router", ["token", "expert_choice"])
def test_bounded_buffers_of_gpus_keep_and_send_what_is_planned(
    router: str, capacity_factor: float, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that routes leave empty, too. Kept bytes within 4 %, as above. Sent bytes do not depend on the routes."""
    moe = {"experts": 8, "kind": "mlp", "router": router, "capacity_factor": capacity_factor}
    traffic = TrafficCounter()
    planned, kept = planned_and_kept(moe, ranks, "fp32", monkeypatch, "cuda", traffic)
    assert kept == pytest.approx(planned, rel=0.04)
    job = job_of(moe, ranks, "fp32")
    exchange = plan_exchange(job, "random", "cuda")
    assert exchange is not None
    assert traffic.take()[0] == {"tokens": exchange.row_bytes}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("capacity_factor", [1.25, 1.0, 0.5])
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_dropped_pairs_are_not_planned(
    kind: str, capacity_factor: float, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 4 %, for independent choices. The loads of a new gate are less even, and it drops more."""
    monkeypatch.setattr(token_gate, "float_linear", lambda x, w: torch.randn_like(x @ w.T) + 0 * (x @ w.T))
    moe = {"experts": 8, "kind": kind, "capacity_factor": capacity_factor}
    planned, kept = planned_and_kept(moe, ranks, "fp32", monkeypatch)
    assert kept == pytest.approx(planned, rel=0.04)


def planned_and_kept(
    moe: dict[str, Any], ranks: int, precision: Any, monkeypatch: pytest.MonkeyPatch,
    device: DeviceKind = "cpu", traffic: TrafficCounter | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The bytes that one of `ranks` ranks is planned to keep for backward, and those that it keeps.

    `traffic` counts what a forward and a backward pass send.
    """
    job = job_of(moe, ranks, precision)
    exchange = plan_exchange(job, "random", device)
    assert exchange is not None and job.expert_parallel == ranks
    traffic = traffic or TrafficCounter()
    model = sharded(job.config.model, ranks, traffic, is_bounded=device == "cuda")
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    losses: list[Tensor] = []

    def forward_pass() -> list[Tensor]:
        losses.append(loss_of(model).sum())
        return losses

    kept = kept_bytes(model, forward_pass, monkeypatch)
    losses[0].backward()  # type: ignore[no-untyped-call]
    return activation_bytes(job, device) + exchange.buffer_bytes, kept


def job_of(moe: dict[str, Any], ranks: int, precision: Any) -> Job:
    shape = {"depth": 4, "width": 96, "heads": 4, "patch_size": 2, "input_size": 16, "channels": 3, "classes": 10}
    config = ModelConfig.model_validate({"variant": "dit", **shape, "moe": moe})
    train = TrainConfig(steps=1, global_batch=BATCH * ranks, precision=precision)
    return plan_job(Config(model=config, train=train), {}, "test", ranks, ranks)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("capacity_factor", [1.5, 1.25, 1.0])
def test_the_shares_of_kept_pairs_and_of_served_tokens_are_those_of_random_choices(
    experts: int, top_k: int, capacity_factor: float
) -> None:
    """Within 5 standard errors of 400 samples of 32 tokens. With more drops, those of a token's pairs are not independent."""
    samples, tokens = 400, 32
    config = MoeConfig(experts=experts, top_k=top_k, capacity_factor=capacity_factor)
    gate = token_gate.TokenGate(experts, config).train()
    torch.manual_seed(0)
    nn.init.eye_(gate.weight)
    kept = gate(torch.randn(samples, tokens, experts))[0].kept
    for share, each in (
        (kept_share(config, tokens), kept.sum((1, 2)) / (tokens * top_k)),
        (served_share(config, tokens, experts // 2), kept[..., : experts // 2].any(2).sum(1) / tokens),
    ):
        assert share == pytest.approx(float(each.mean()), abs=float(5 * each.std() / samples**0.5 + 1e-6))


def test_grouped_products_keep_more_than_experts_in_turn() -> None:
    """Autograd keeps the token and two results of each pair. A GPU in bf16 has grouped products."""

    def planned(device: Any, precision: Any) -> int:
        config = ModelConfig(variant="dit", moe=MoeConfig(experts=4))
        return activation_bytes(
            plan_job(
                Config(model=config, train=TrainConfig(steps=1, global_batch=2, precision=precision)), {}, "t", 2, 2
            ),
            device,
        )

    assert planned("cuda", "bf16") > 1.2 * planned("cpu", "bf16")
    assert planned("cuda", "fp32") == planned("cpu", "fp32")
