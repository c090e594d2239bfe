"""What compiled blocks keep for backward, and how often they are compiled. Graphs are partitioned, but no code is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.config import Config
from sdit.expert_parallel.all_to_all import ExpertGroup, TrafficCounter
from sdit.expert_parallel.device_plan import pack_plan
from sdit.expert_parallel.dispatcher import PlannedPass
from sdit.expert_parallel.placement import ExpertPlacement
from sdit.expert_parallel.step_plan import MicroStepPlan, plan_blocks
from sdit.model import DiffusionTransformer, build_model
from sdit.train.layer_wrapping import wrap_layers

DEPTH, WIDTH, SAMPLES, TOKENS = 12, 32, 6, 4
SHAPE = {"width": WIDTH, "heads": 2, "input_size": 4, "channels": 3, "classes": 5, "timesteps": 50}


MODERN = {"norm": "rms", "ffn": "swiglu", "qk_norm": "rms", "rope": True, "positions": "none"}


class Compiled:
    """A backend that counts what it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


class OnePlan:
    """All samples of a group of one rank, by a plan."""

    def __init__(self, depth: int) -> None:
        self._experts = np.tile([[0, 1], [1, 2], [2, 0]] * (SAMPLES // 3), (depth, 1, 1))
        self._placement = ExpertPlacement(np.zeros((depth, 3), dtype=int), np.zeros((depth, 3), dtype=bool), 1)

    def forward_pass(self, task: Tensor) -> PlannedPass:
        samples, blocks = np.arange(SAMPLES), plan_blocks(self._experts, None, self._placement, 0)
        plan = MicroStepPlan(samples, samples, slice(0, SAMPLES), self._experts, None, None, blocks)
        group = ExpertGroup(None, 0, 1, True, TrafficCounter())
        return PlannedPass(group, pack_plan(plan, self._placement, 0).to_device(torch.device("cpu")))


def _model(depth: int, kind: str, backend: Any, **options: Any) -> DiffusionTransformer:
    torch._dynamo.reset()
    model = build_model({**SHAPE, "depth": depth, "experts": {"kind": kind, "count": 3, "top_k": 2}, **options})
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def _step(model: DiffusionTransformer) -> list[tuple[int, ...]]:
    """Take a forward and a backward pass. Return the shapes that autograd saved."""
    shapes: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(SAMPLES, 3, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        out = model(x, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64)).prediction
    out.sum().backward()
    return shapes


def test_a_compiled_block_saves_no_merged_matrices() -> None:
    shapes = _step(_model(2, "linear", "aot_eager_decomp_partition"))
    assert (SAMPLES, TOKENS, WIDTH) in shapes
    assert not [shape for shape in shapes if shape[:1] == (SAMPLES,) and np.prod(shape) >= SAMPLES * WIDTH**2]


@pytest.mark.parametrize("options", [{}, MODERN], ids=["default", "modern"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_pieces_between_exchanges_compile_once_for_all_blocks(kind: str, options: dict[str, Any]) -> None:
    backend = Compiled()
    model = _model(DEPTH, kind, backend, **options)
    model.dispatcher = OnePlan(DEPTH)
    _step(model)
    assert backend.graphs == 2  # the modulation before the results arrive, and the branches after


@pytest.mark.parametrize("options", [{}, MODERN], ids=["default", "modern"])
def test_a_block_with_all_its_experts_compiles_once_into_one_graph(options: dict[str, Any]) -> None:
    backend = Compiled()
    _step(_model(DEPTH, "linear", backend, **options))
    assert backend.graphs == 1


@pytest.mark.parametrize("variant", ["dit", "switch"])
def test_token_routed_experts_are_left_out_of_what_is_compiled(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The number of tokens of an expert changes in each step, and must compile nothing again. The numbers stay the same."""
    torch._dynamo.reset()
    backend, plain_compile = Compiled(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer: plain_compile(layer, backend=backend))
    moe = {"experts": 4, "top_k": 2, "shared": 1}
    model = build_model({**SHAPE, "depth": 3, "variant": variant, "moe": moe, "learn_variance": False})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    t, y, batches = torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64), torch.randn(4, SAMPLES, 3, 4, 4)
    expected = [model(x, t, y).prediction for x in batches]
    wrap_layers(model, Config.model_validate({"parallel": {"compile": True}}), torch.device("cpu"))
    for x, plain in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(x, t, y).prediction, plain)
        assert backend.graphs == 2  # what stands before the experts, and what follows them
