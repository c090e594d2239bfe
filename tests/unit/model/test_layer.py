"""The seams through which parallel code drives the model: dispatcher, layers, checkpointing."""

import copy
import weakref
from collections.abc import Callable
from operator import index
from typing import Any, SupportsIndex

import pytest
import torch
from fairscale.nn.checkpoint import checkpoint_wrapper  # type: ignore[import-untyped]
from torch import Tensor, nn

from sdit.contracts import TaskView
from sdit.model import DiffusionTransformer, LocalDispatcher
from sdit.model.moe.local import LocalPass

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]
MODERN = {"norm": "rms", "ffn": "swiglu", "qk_norm": "rms", "rope": True, "positions": "none"}
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])


def _gradients(model: DiffusionTransformer, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(*batch)
    (output.prediction.square().mean() + output.routing.gate_probs.square().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class _GroupDispatcher(LocalDispatcher):
    """Stands for two ranks that see each other's tasks; remembers what it was given."""

    def __init__(self, others: Tensor, batch: int, kept: Tensor | None = None, experts: Tensor | None = None) -> None:
        self.others, self.batch, self.kept, self.experts = others, batch, kept, experts
        self.seen: list[tuple[int, Tensor]] = []

    def forward_pass(self, task: Tensor) -> LocalPass:
        dispatcher, batch = self, self.batch

        class GroupPass(LocalPass):
            def dispatch(self, block: SupportsIndex, z: Tensor, gates: Tensor, experts: nn.Module) -> Any:
                dispatcher.seen.append((index(block), gates.detach()))
                return super().dispatch(block, z, gates[-batch:], experts)

        tasks = torch.cat([self.others, task])
        return GroupPass(TaskView(tasks, slice(len(self.others), None), self.experts, self.kept))


@KINDS
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("variant", ["switch", "dtr", "dit"])
@pytest.mark.parametrize("options", [{}, MODERN], ids=["default", "modern"])
def test_checkpointed_layers_give_the_same_gradients(
    make_model: MakeModel, batch: Batch, kind: str, offload: bool, variant: str, options: dict[str, Any]
) -> None:
    model = make_model(variant=variant, experts={"kind": kind}, **options)
    plain = _gradients(model, batch)
    for layer in model.layers:
        checkpoint_wrapper(layer, offload_to_cpu=offload)
    checkpointed = _gradients(model, batch)
    assert plain.keys() == checkpointed.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_layers_add_no_parameter_names(make_model: MakeModel) -> None:
    heads = {name.split(".")[0] for name in make_model().state_dict()}
    assert heads == {"x_embedder", "t_embedder", "y_embedder", "blocks", "routers", "final_layer", "pos_embed"}


def test_the_rotary_table_is_one_buffer_of_the_model(make_model: MakeModel) -> None:
    model = make_model(**MODERN)
    names = {name for name, _ in model.named_buffers()}
    assert names == {"feat_rope.freqs_cos", "feat_rope.freqs_sin"} and names <= model.state_dict().keys()
    twin = copy.deepcopy(model)
    assert twin.feat_rope is not model.feat_rope
    assert all(layer.rope is twin.feat_rope for layer in twin.layers)


def test_a_copy_shares_no_weights(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    before = model(*batch).prediction
    with torch.no_grad():
        for parameter in copy.deepcopy(model).parameters():
            parameter.zero_()
    assert torch.equal(model(*batch).prediction, before)
    twin = copy.deepcopy(model)
    assert all(layer.block is block for layer, block in zip(twin.layers, twin.blocks, strict=True))


def test_model_is_freed_without_garbage_collection(make_model: MakeModel) -> None:
    model = make_model()
    alive = weakref.ref(model)
    del model
    assert alive() is None


@KINDS
def test_a_groups_view_gives_the_same_prediction_and_own_routing(
    make_model: MakeModel, batch: Batch, kind: str
) -> None:
    model = make_model(experts={"kind": kind})
    alone = model(*batch)
    dispatcher = _GroupDispatcher(torch.tensor([3, 48, 17]), len(batch[0]))
    model.dispatcher = dispatcher
    grouped = model(*batch)
    # another GEMM shape may round the gates differently: 1e-6 is a few float32 eps
    torch.testing.assert_close(grouped.prediction, alone.prediction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grouped.routing.gate_probs, alone.routing.gate_probs, rtol=0, atol=1e-6)
    assert torch.equal(grouped.routing.experts, alone.routing.experts)
    assert torch.equal(grouped.routing.task, batch[1])
    assert [block for block, _ in dispatcher.seen] == [0, 1]
    assert all(gates.shape == (9, 3) and ((gates != 0).sum(1) == 2).all() for _, gates in dispatcher.seen)


def test_gates_are_the_top_probabilities_as_they_are(make_model: MakeModel, batch: Batch) -> None:
    model = make_model(experts={"count": 5, "top_k": 2})
    model.dispatcher = dispatcher = _GroupDispatcher(batch[1][:0], len(batch[0]))
    probs = model(*batch).routing.gate_probs.detach()
    for block, gates in dispatcher.seen:
        cut = probs[block].sort(descending=True).values[:, 1:2]
        assert torch.equal(gates, torch.where(probs[block] >= cut, probs[block], 0))


def test_a_view_fixes_the_choice_and_drops_samples(make_model: MakeModel, batch: Batch) -> None:
    model = make_model()
    experts = torch.tensor([2, 0]).expand(2, 6, 2)
    kept = torch.ones(2, 6, 2, dtype=torch.bool)
    kept[1, 3, 0] = False
    model.dispatcher = dispatcher = _GroupDispatcher(batch[1][:0], 6, kept, experts)
    routing = model(*batch).routing
    assert torch.equal(routing.experts, experts)
    for block, gates in dispatcher.seen:
        expected = routing.gate_probs[block].detach().clone()
        expected[:, 1] = 0
        expected[3, 2] *= block != 1
        assert torch.equal(gates, expected)


@pytest.mark.parametrize("variant", ["dtr", "dit"])
def test_models_without_gates_route_nothing(make_model: MakeModel, batch: Batch, variant: str) -> None:
    model = make_model(variant=variant)
    routing = model(*batch).routing
    assert routing.gate_probs.shape == (0, 6, 0) and routing.experts.shape == (0, 6, 0)
    assert torch.equal(routing.task, batch[1]) and len(model.all_gate_probs()) == 0
