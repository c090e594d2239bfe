"""Configs become models with reproducible weights and known sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdit.config import SIZES, ModelConfig
from sdit.errors import ConfigError
from sdit.model import DiffusionTransformer, build_experts, build_model, count_parameters, init_weights

Batch = tuple[Tensor, Tensor, Tensor]
MakeModel = Callable[..., DiffusionTransformer]
SMALL = {"depth": 2, "width": 16, "heads": 2, "input_size": 4, "channels": 3, "classes": 5}


def _dense_count(config: ModelConfig) -> int:
    """Parameters of DiT from the shapes in its paper."""
    d, patch = config.width, config.patch_size**2
    hidden = int(d * config.mlp_ratio)
    block = (3 * d * d + 3 * d) + (d * d + d) + (2 * d * hidden + hidden + d) + (6 * d * d + 6 * d)
    time, label = (256 * d + d) + (d * d + d), (config.classes + 1) * d if config.classes else 0
    final = (2 * d * d + 2 * d) + (d + 1) * patch * config.out_channels
    return patch * config.channels * d + d + time + label + config.depth * block + final


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_presets_have_the_papers_shapes(size: str, patch: int) -> None:
    for variant in ("dit", "dtr", "switch"):
        model = build_model({"variant": variant, "size": f"{size}/{patch}"}, device="meta")
        assert (len(model.layers), model.config.width, model.layers[0].block.attn.heads) == SIZES[size]
        d, depth = model.config.width, model.config.depth
        gates, expert = 3 * (d + 1), d * d + d
        extra = depth * (gates + 3 * expert) if variant == "switch" else 0
        unused = depth * expert if variant == "switch" else 0
        dense = _dense_count(model.config)
        assert count_parameters(model) == (dense + extra, dense + extra - unused)


def test_largest_preset_with_many_experts_needs_no_memory() -> None:
    experts = {"count": 64, "top_k": 4, "kind": "mlp", "mlp_ratio": 4.0}
    model = build_model({"size": "XL/2", "experts": experts}, device="meta")
    d, count = model.config.width, count_parameters(model)
    expert = 2 * 4 * d * d + 4 * d + d
    assert count.total == _dense_count(model.config) + 28 * (64 * (d + 1) + 64 * expert)
    assert count.total - count.active == 28 * 60 * expert
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": 28, "channels": 1, "classes": 0, "learn_variance": False, "patch_size": 4},
        {"input_size": 8, "channels": 3, "patch_size": 8, "mlp_ratio": 2.5},
        {"experts": {"count": 1, "top_k": 1}, "classes": 1},
    ],
)
@pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])
def test_any_shape_of_image_comes_back(variant: str, overrides: dict[str, Any]) -> None:
    model = build_model(SMALL | {"variant": variant} | overrides)
    config = model.config
    x = torch.randn(3, config.channels, config.input_size, config.input_size)
    y = torch.zeros(3, dtype=torch.int64) if config.classes else None
    for mode in (True, False):
        output = model.train(mode)(x, torch.tensor([0, 500, 999]), y)
        assert output.prediction.shape == (3, config.out_channels, config.input_size, config.input_size)


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"size": "M/2"}, "model.size: 'M/2'"),
        ({"size": "S/2", "depth": 3}, "model.depth: 3"),
        ({"depht": 3}, "model.depht: unknown key; did you mean depth?"),
        ({"depth": 0}, "model.depth: 0 is not legal"),
        ({"depth": "12"}, "model.depth: '12' is not legal"),
        ({"width": 384, "heads": 5}, "model.heads: 5"),
        ({"variant": "moe"}, "model.variant: 'moe' is not legal (input should be 'switch', 'dtr' or 'dit')"),
        ({"experts": {"count": 2, "top_k": 3}}, "model.experts.top_k: 3"),
        ({"size": "B/3"}, "model.size: 'B/3' is not known; legal: S, B, L, XL, 1.0B, 1.6B, then '/' and 1, 2, 4 or 8"),
        ({"size": "1x0B/2"}, "model.size: '1x0B/2'"),
        ({"norm": "batch"}, "model.norm: 'batch' is not legal (input should be 'layer' or 'rms')"),
        ({"ffn": "relu"}, "model.ffn: 'relu' is not legal (input should be 'gelu' or 'swiglu')"),
        ({"ffn": "swiglu", "width": 4, "heads": 1, "mlp_ratio": 0.25}, "model.mlp_ratio: 0.25 gives an MLP without"),
        ({"qk_norm": True}, "model.qk_norm: True is not legal (input should be 'none', 'rms' or 'layer')"),
        ({"rope": 1}, "model.rope: 1 is not legal"),
        ({"rope": True, "width": 60, "heads": 6}, "model.rope: true is not legal with 10 channels per head"),
        ({"positions": "learned"}, "model.positions: 'learned' is not legal (input should be 'sincos' or 'none')"),
        ({"position_base": 0}, "model.position_base: 0 is not legal"),
        ({"position_base": 16.0}, "model.position_base: 16.0 is not legal"),
        ({"time_scale": 0}, "model.time_scale: 0 is not legal"),
        ({"time_scale": float("inf")}, "model.time_scale: inf is not legal"),
        ({"width": 6, "heads": 1}, "model.width: 6 is not a multiple of 4"),
        ({"experts": {"number": 2}}, "model.experts.number: unknown key"),
    ],
)
def test_a_wrong_config_is_one_line_with_key_and_value(values: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(values)
    message = str(caught.value)
    assert message.startswith(start) and "\n" not in message


def test_weights_are_a_function_of_seed_and_name() -> None:
    first = dict(build_model(SMALL, seed=7).named_parameters())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = dict(build_model(SMALL | {"variant": "dit", "depth": 3}, seed=7).named_parameters())
    other = dict(build_model(SMALL, seed=8).named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    shared = first.keys() & second.keys()
    assert len(shared) == len(first) - 8  # all but gates and experts, of weight and bias, of two blocks
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert {name for name in first if torch.equal(first[name], other[name])} == {n for n in first if not first[n].any()}
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], first["blocks.1.mlp.fc1.weight"])


def test_a_subset_of_experts_starts_with_the_same_weights() -> None:
    config = {**SMALL, "experts": {"count": 6, "top_k": 2, "kind": "mlp"}}
    full, part = build_model(config), build_model(config, device="meta")
    w1, ids = full.get_parameter("routers.0.experts.w1"), [4, 1]
    assert not torch.equal(w1[4], w1[1])
    with torch.device("meta"):
        for layer in part.layers:
            assert layer.router is not None
            layer.router.experts = build_experts(part.config.experts, part.config.width, ids)
    init_weights(part.to_empty(device="cpu"), seed=0)
    expected = dict(full.named_parameters())
    for name, parameter in part.named_parameters():
        whole = expected[name]
        assert torch.equal(parameter, whole[ids] if ".experts." in name else whole), name


def test_matrices_start_with_the_spread_of_the_paper() -> None:
    parameters = dict(build_model(SMALL | {"width": 64}).named_parameters())
    for name, fan in {"attn.qkv": 64 + 192, "attn.proj": 128, "mlp.fc1": 64 + 256, "mlp.fc2": 64 + 256}.items():
        weight = parameters[f"blocks.1.{name}.weight"]
        bound = (6 / fan) ** 0.5  # Xavier-uniform; thousands of draws come within 1 % of the bound
        assert 0.99 * bound < weight.abs().max() <= bound
    patch = parameters["x_embedder.proj.weight"]
    assert 0.95 * (6 / (12 + 64)) ** 0.5 < patch.abs().max() <= (6 / (12 + 64)) ** 0.5
    time = parameters["t_embedder.mlp.0.weight"]
    assert time.std().item() == pytest.approx(0.02, rel=5 / (2 * time.numel()) ** 0.5)  # five standard errors


def test_all_variants_compute_the_same_function_at_the_start() -> None:
    x, t, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 2, 5])
    outputs = []
    for variant in ("dit", "dtr", "switch"):
        model = build_model(SMALL | {"variant": variant})
        assert not model(x, t, y).prediction.any()  # the output layer is zero
        with torch.no_grad():
            for i, parameter in enumerate(model.final_layer.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        outputs.append(model(x, t, y).prediction)
    # DTR's masked and unmasked parts are added up again: one float32 rounding per block and channel
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[2], outputs[0])


def test_parameters_of_the_options_are_counted() -> None:
    """Against the shapes of section A: 2 D weights of norms per block and D behind them, 2 d of q and k, and W12, W3."""
    options = {"norm": "rms", "ffn": "swiglu", "qk_norm": "layer", "rope": True, "positions": "none"}
    plain, modern = (build_model({"variant": "dit", "size": "XL/1", **more}, device="meta") for more in ({}, options))
    d, depth, hidden = 1152, 28, 3072  # of LightningDiT-XL/1
    mlp = (2 * hidden * d + 2 * hidden) + (hidden * d + d)
    dense_mlp = 2 * 4 * d * d + 4 * d + d
    more = depth * (mlp - dense_mlp + 2 * d + 4 * 72) + d
    assert modern.config.hidden == hidden
    assert count_parameters(modern).total == count_parameters(plain).total + more


def test_initial_weights_of_the_options() -> None:
    options = {"norm": "rms", "ffn": "swiglu", "qk_norm": "layer", "rope": True}
    plain, modern = (dict(build_model(SMALL | {"width": 64} | more).named_parameters()) for more in ({}, options))
    norms = {name for name in modern if name.endswith("weight") and "norm" in name}
    assert len(norms) == 2 * 4 + 1 and all((modern[name] == 1).all() for name in norms)
    assert not modern["blocks.0.attn.q_norm.bias"].any() and not modern["blocks.1.mlp.w12.bias"].any()
    for name, fan in {"mlp.w12": 64 + 2 * 170, "mlp.w3": 170 + 64}.items():
        bound, weight = (6 / fan) ** 0.5, modern[f"blocks.1.{name}.weight"]
        assert 0.99 * bound < weight.abs().max() <= bound
    assert all(torch.equal(plain[name], modern[name]) for name in plain.keys() & modern.keys())
    assert plain.keys() - modern.keys() == {name for name in plain if ".mlp.fc" in name}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_switch_with_fresh_experts_equals_dit(make_model: MakeModel, batch: Batch, kind: str) -> None:
    dit, switch = make_model(variant="dit"), build_model(make_model(experts={"kind": kind}).config)
    switch.load_state_dict(dit.state_dict(), strict=False)
    assert torch.equal(switch(*batch).prediction, dit(*batch).prediction)


def test_dtr_with_every_channel_active_equals_dit(make_model: MakeModel, batch: Batch) -> None:
    dit, dtr = make_model(variant="dit"), make_model(variant="dtr", dtr={"beta": 1.0})
    assert torch.equal(dtr(*batch).prediction, dit(*batch).prediction)
