"""How times become tasks, gates and conditions."""

from collections.abc import Callable
from typing import Any, SupportsIndex

import pytest
import torch
from torch import Tensor, nn

from sdit.model import DiffusionTransformer, LocalDispatcher
from sdit.model.moe.local import LocalPass

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]


class _Spy(LocalDispatcher):
    """Remembers how many rows of gates every block was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward_pass(self, task: Tensor) -> LocalPass:
        rows, view = self.rows, super().forward_pass(task).view

        class CountingPass(LocalPass):
            def dispatch(self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: nn.Module) -> Any:
                rows.append(len(gates))
                return super().dispatch(block, z, gates, experts)

        return CountingPass(view)


@pytest.mark.parametrize("variant", ["switch", "dtr", "dit"])
@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("time", [21, 0.43])
def test_one_time_for_all_equals_that_time_repeated(
    make_model: MakeModel, batch: Batch, variant: str, classes: int, time: int | float
) -> None:
    model = make_model(variant=variant, classes=classes)
    x, _, y = batch
    repeated = model(x, torch.full((6,), time), y)  # with gradient, hence without the shortcut
    for shared in (time, torch.tensor(time), torch.tensor([time]), torch.tensor(time).expand(6)):
        output = model(x, shared, y)
        torch.testing.assert_close(output.prediction, repeated.prediction, rtol=1e-5, atol=1e-5)
        assert torch.equal(output.routing.task, repeated.routing.task)
        assert output.routing.gate_probs.shape == repeated.routing.gate_probs.shape
        assert output.routing.experts.shape == repeated.routing.experts.shape


def test_experts_are_merged_once_when_sampling(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    model.dispatcher = spy = _Spy()
    x, t, y = batch
    with torch.no_grad():
        for shared in (21, torch.full((6,), 21)):
            model(x, shared, y)
        assert spy.rows == [1] * 4
        model(x, t, y)
    model(x, torch.full((6,), 21), y)
    assert spy.rows[4:] == [6] * 4


@pytest.mark.parametrize("variant", ["switch", "dtr", "dit"])
def test_continuous_time_at_a_task_equals_the_task(make_model: MakeModel, batch: Batch, variant: str) -> None:
    model = make_model(variant=variant, timesteps=64)  # a power of two: t / 64 and back are exact
    x, t, y = batch
    torch.testing.assert_close(model(x, t / 64, y).prediction, model(x, t, y).prediction, rtol=1e-5, atol=1e-5)


def test_continuous_times_make_exactly_the_tasks(make_model: MakeModel) -> None:
    model = make_model(timesteps=64)
    task = model.gate_task(torch.linspace(0, 1, 64 * 8 + 1))
    assert torch.equal(task[:-1], torch.arange(64).repeat_interleave(8)) and task[-1] == 63


def test_gates_see_the_task_and_the_condition_sees_the_time(make_model: MakeModel, batch: Batch) -> None:
    model = make_model(timesteps=64)
    x, _, y = batch
    early, late = model(x, 20.1 / 64, y), model(x, 20.9 / 64, y)
    assert torch.equal(early.routing.gate_probs, late.routing.gate_probs)
    torch.testing.assert_close(early.routing.gate_probs[:, 0], model.all_gate_probs()[:, 20], rtol=0, atol=1e-6)
    assert not torch.allclose(early.prediction, late.prediction, atol=1e-3)


def test_gates_do_not_see_the_label_or_the_image(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    x, t, y = batch
    assert torch.equal(model(x, t, y).routing.gate_probs, model(-x, t, y.flip(0)).routing.gate_probs)


def test_bf16_weights_give_float32_gates_of_the_stored_weights(make_model: MakeModel, batch: Batch) -> None:
    model = make_model(experts={"count": 8, "top_k": 2}).bfloat16()
    stored = make_model(experts={"count": 8, "top_k": 2}).bfloat16().float()
    assert model.all_gate_probs().dtype == torch.float32
    assert torch.equal(model.all_gate_probs(), stored.all_gate_probs())
    assert model(*batch).prediction.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_autocast_leaves_the_gates_alone(make_model: MakeModel, batch: Batch, kind: str) -> None:
    model = make_model(experts={"kind": kind})
    exact = model(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(*batch)
    mixed.prediction.sum().backward()
    assert torch.equal(mixed.routing.gate_probs, exact.routing.gate_probs)
