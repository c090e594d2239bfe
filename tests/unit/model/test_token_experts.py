"""Token-routed experts: choices and limits, grouped products, recomputation, initial weights and upcycling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor

from sdit.config import ModelConfig, MoeConfig, load_config
from sdit.errors import ConfigError
from sdit.interop import load_published, to_published
from sdit.interop.fitting import fit_weights
from sdit.model import DiffusionTransformer, build_model, count_parameters, init_weights
from sdit.model.moe import mlp_experts
from sdit.model.moe.experts import build_token_experts
from sdit.model.moe.token_gate import TokenGate
from sdit.model.moe.token_local import LocalTokenPass
from sdit.model.moe.token_moe import TokenMoe

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL: dict[str, Any] = {
    "variant": "dit", "depth": 2, "width": 16, "heads": 2, "input_size": 8, "channels": 3, "classes": 5, "timesteps": 50,
}  # fmt: skip
ROUTERS: dict[str, dict[str, Any]] = {
    "token": {"router": "token", "shared": 1},
    "choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "capacity": {"router": "token", "capacity_factor": 1.0, "renormalize": True, "scale": 2.0},
}


def _model(**moe: Any) -> DiffusionTransformer:
    model = build_model(SMALL | {"moe": {"experts": 4, **moe}})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, 8, 8, generator=generator), torch.tensor([0, 21, 49]), torch.tensor([0, 4, 5])


def _gate(**keys: Any) -> TokenGate:
    gate = TokenGate(16, MoeConfig(experts=4, **keys))
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(3))
    return gate


def _tokens(samples: int = 3, tokens: int = 12) -> Tensor:
    return torch.randn(samples, tokens, 16, generator=torch.Generator().manual_seed(4))


def test_an_expert_keeps_the_tokens_with_its_largest_weights_and_the_first_of_equal_ones() -> None:
    gate, x = _gate(capacity_factor=0.5), _tokens()
    x[:, 6:] = x[:, :6]  # each token is there twice
    choice, routes, statistics = gate(x)
    limit = 3  # ceil(0.5 * 12 * 2 / 4)
    assert routes.limit == limit
    scores = (x @ gate.weight.T).softmax(-1)
    for sample in range(3):
        for expert in range(4):
            users = [t for t in range(12) if expert in choice.chosen[sample, t]]
            kept = sorted(users, key=lambda t: (-float(scores[sample, t, expert].detach()), t))[:limit]
            assert choice.kept[sample, :, expert].nonzero().flatten().tolist() == sorted(kept)
            assert statistics.counts[sample, expert] == len(users) and statistics.served[sample, expert] == len(kept)
    assert torch.equal(routes.weights != 0, routes.kept) and not torch.equal(statistics.counts, statistics.served)
    assert torch.equal(routes.kept.sum(0), statistics.served.sum(0))
    assert gate.eval()(x)[0].kept.sum() == 3 * 12 * 2  # no limit outside of training


@pytest.mark.parametrize("name", ROUTERS)
def test_the_pairs_are_those_that_are_chosen_sorted_by_expert(name: str) -> None:
    keys = {key: value for key, value in ROUTERS[name].items() if key != "shared"}
    choice, routes, _ = _gate(**keys)(_tokens())
    pairs = routes.pairs()
    found = torch.zeros_like(routes.kept)
    found[pairs.rows, pairs.columns] = True
    order = pairs.columns * len(found) + pairs.rows
    assert (order.diff() > 0).all() and (found | ~routes.kept).all()
    assert pairs.counts() == found.sum(0).tolist() and len(pairs.rows) == choice.chosen.numel()


def test_a_sample_under_expert_choice_does_not_depend_on_the_others() -> None:
    gate, x = _gate(router="expert_choice"), _tokens()
    whole = gate(x)[1].weights.view(3, 12, 4)
    for sample in range(3):
        assert torch.equal(whole[sample], gate(x[sample : sample + 1])[1].weights)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("name", ROUTERS)
def test_grouped_products_equal_the_loop(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    layer = TokenMoe(ModelConfig(width=16, heads=2, moe={"experts": 4, "kind": kind, **ROUTERS[name]}))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.25, generator=generator)
    results = []
    for is_grouped in (True, False):
        monkeypatch.setattr(mlp_experts, "has_grouped_product", lambda *_, value=is_grouped: value)
        x = _tokens().requires_grad_()
        y, _ = layer(x, 0, LocalTokenPass())
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for one, other in zip(*results, strict=True):
        # Sums of at most 64 terms in another order: each addition rounds by 6e-8 of the largest partial sum.
        torch.testing.assert_close(one, other, rtol=0, atol=64 * 6e-8 * max(1.0, float(other.detach().abs().max())))


@pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])
@pytest.mark.parametrize("name", ROUTERS)
def test_recomputation_routes_as_the_first_pass_and_counts_once(name: str, variant: str) -> None:
    balance = "none" if name == "choice" else "aux"
    model = _model(**ROUTERS[name], balance=balance)
    model = build_model(model.config.model_copy(update={"variant": variant}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    plain = model(*_inputs())
    wanted = torch.autograd.grad(plain.prediction.square().mean() + plain.aux_loss, list(model.parameters()))
    chosen: list[Tensor] = []
    for block in model.blocks:
        gate = block.moe.gate  # type: ignore[union-attr]
        gate.register_forward_hook(lambda _gate, _inputs, result: chosen.append(result[0].chosen))  # type: ignore[union-attr]
        gate.register_forward_pre_hook(_flip_after_first(), with_kwargs=False)  # type: ignore[union-attr]
    model.layers = tuple(checkpoint_wrapper(layer) for layer in model.layers)
    output = model(*_inputs())
    assert torch.equal(output.tokens.counts, plain.tokens.counts) and torch.equal(output.aux_loss, plain.aux_loss)
    (output.prediction.square().mean() + output.aux_loss).backward()
    assert len(chosen) == 4 and torch.equal(chosen[0], chosen[3]) and torch.equal(chosen[1], chosen[2])
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def _flip_after_first() -> Any:
    """A hook that changes the input of the second pass by rounding errors, as another kernel would."""
    passes = []

    def hook(_gate: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        passes.append(None)
        x, *others = inputs
        return (x * (1 + 1e-6 * (len(passes) - 1)), *others)

    return hook


def test_initial_weights_of_an_expert_depend_on_its_id_only() -> None:
    whole, part = build_model(SMALL | {"moe": {"experts": 4}}), build_model(SMALL | {"moe": {"experts": 4}})
    assert whole.config.moe is not None
    for block in part.blocks:
        block.moe.experts = build_token_experts(whole.config.moe, 16, (3, 1))  # type: ignore[union-attr]
    init_weights(part, 0)
    for name, parameter in part.named_parameters():
        values = whole.get_parameter(name)
        assert torch.equal(parameter, values[[3, 1]] if ".experts." in name else values)
    load_published(part, to_published(_model()))
    assert torch.equal(part.blocks[0].moe.experts.up_proj, _model().blocks[0].moe.experts.up_proj[[3, 1]])  # type: ignore[union-attr,index]
    gate = build_model(SMALL | {"moe": {"experts": 64}}).blocks[0].moe.gate.weight  # type: ignore[union-attr]
    assert gate.abs().max() <= 0.25 and gate.std().item() == pytest.approx(
        0.25 / 3**0.5, rel=0.1
    )  # uniform in +-1 / sqrt(16)
    gate = build_model(SMALL | {"moe": {"experts": 64, "router": "expert_choice"}}).blocks[0].moe.gate.weight  # type: ignore[union-attr]
    assert gate.std().item() == pytest.approx(0.006, rel=0.1)


def test_the_bias_is_not_rounded_and_not_trained() -> None:
    model = _model(balance="bias")
    bias = model.blocks[0].moe.gate.e_score_correction_bias  # type: ignore[union-attr]
    before = bias.clone()
    assert not bias.requires_grad and bias.dtype == model.bfloat16().blocks[0].moe.gate.e_score_correction_bias.dtype  # type: ignore[union-attr]
    assert torch.equal(bias, before)
    model.move_gate_biases(torch.tensor([[1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 4.0, 4.0]]))
    moved = (model.blocks[0].moe.gate.e_score_correction_bias - before) / 0.001  # type: ignore[union-attr]
    assert torch.allclose(moved, torch.tensor([1.0, 0.0, -1.0, 0.0]), atol=1e-3)


def test_an_upcycled_model_is_the_dense_model() -> None:
    dense = build_model(SMALL)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    published = to_published(dense)
    for more, is_same in (({"renormalize": True, "every": 2}, True), ({"renormalize": False}, False)):
        model = build_model(SMALL | {"moe": {"experts": 4, "kind": "mlp", **more}})
        fitted = fit_weights(model, published, ())
        load_published(model, fitted.tensors, fitted.kept)
        error = (model(*_inputs()).prediction - dense(*_inputs()).prediction).norm() / dense(
            *_inputs()
        ).prediction.norm()
        assert (error < 1e-5) == is_same == ("the output is that of the dense model" in fitted.notes[0])
    for more in ({"kind": "swiglu"}, {"kind": "mlp", "hidden_ratio": 2.0}):
        with pytest.raises(ConfigError, match=r"model\.moe: experts of kind .*; legal: kind mlp and hidden_ratio 4"):
            fit_weights(build_model(SMALL | {"moe": {"experts": 4, **more}}), published, ())


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("ditmoe_s2_8e2a", 199e6, 71e6), ("ditmoe_b2_8e2a", 795e6, 286e6), ("ditmoe_xl2_8e2a", 4.1e9, 1.5e9)],
)
def test_presets_have_the_published_numbers_of_parameters(preset: str, total: float, active: float) -> None:
    """arXiv 2407.11633 gives two or three digits, rounded or cut off."""
    config = load_config(CONFIGS / f"{preset}.yaml")
    count = count_parameters(build_model(config.model, device="meta"))
    assert (count.total, count.active) == (pytest.approx(total, rel=0.02), pytest.approx(active, rel=0.02))
