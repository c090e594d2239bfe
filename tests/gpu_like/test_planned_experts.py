"""MLP experts of one rank that follow a plan, as on a GPU without a grouped product, give the bits of the plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sdit.expert_parallel.step_planner as step_planner
from sdit.config import ResolvedRun
from sdit.contracts import Batch
from sdit.expert_parallel.expert_parallel import ExpertParallel
from sdit.model import DiffusionTransformer, build_model, experts_need_plan
from sdit.topology import BatchPlan
from tests.gpu_like.conftest import META
from tests.gpu_like.meta_run import GLOBAL_BATCH, FakeComm, make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class CpuComm(FakeComm):
    device = CPU


def _comm() -> Any:
    return CpuComm(1)


def filled(model: DiffusionTransformer) -> None:
    """No weight is zero, so that each expert and each gate has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.pos_embed.zero_()


def planned(monkeypatch: pytest.MonkeyPatch, needs_plan: bool) -> tuple[list[torch.Tensor], bool]:
    """The output and the gradients of one micro-step, and whether it was planned."""
    monkeypatch.setattr(step_planner, "experts_need_plan", lambda *_: needs_plan)
    config, comm = make_config("switch", "mlp"), _comm()
    run = ResolvedRun(config, {}, BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH, 1), 1, 1, 0)
    experts, model = ExpertParallel(run, comm), build_model(config.model, device="meta")
    experts.shard(model, filled)
    t = np.array([0, 9, 9, 20, 33, 41, 55, 63])
    x = torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    index = torch.arange(GLOBAL_BATCH)
    batch = Batch(index=index, x0=x, noise=x, t=torch.from_numpy(t), y=index % 10)
    experts.begin_step(0, t)
    batch = experts.begin_micro_step(0, batch)
    out = model(batch.x0, batch.t, batch.y).prediction
    out.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [out.detach(), *(grad for grad in gradients if grad is not None)], experts.is_planned


def test_planned_experts_equal_the_loop_that_reads_its_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, was_planned = planned(monkeypatch, needs_plan=False)
    follows, is_planned = planned(monkeypatch, needs_plan=True)
    assert is_planned and not was_planned and len(plain) == len(follows) > 40
    assert all(torch.equal(one, other) for one, other in zip(plain, follows, strict=True))


@pytest.mark.parametrize(
    ("variant", "kind", "device", "dtype", "capability", "expected"),
    [
        ("switch", "mlp", CUDA, torch.float32, (9, 0), True),
        ("switch", "mlp", CUDA, torch.bfloat16, (9, 0), False),
        ("switch", "mlp", CUDA, torch.bfloat16, (7, 5), True),
        ("switch", "mlp", CPU, torch.float32, (9, 0), False),
        ("switch", "mlp", META, torch.float32, (9, 0), True),
        ("switch", "linear", CUDA, torch.float32, (9, 0), False),
        ("dit", "mlp", CUDA, torch.float32, (9, 0), False),
    ],
)
def test_experts_are_planned_where_they_would_read_their_gates(
    monkeypatch: pytest.MonkeyPatch, variant: str, kind: str, device: torch.device, dtype: torch.dtype,
    capability: tuple[int, int], expected: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    config: Any = make_config(variant, kind).model
    assert experts_need_plan(config, device, dtype) is expected
