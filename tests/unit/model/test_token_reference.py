"""Token-routed experts reproduce numbers of an independent implementation (tests/data/README.md; its tolerances)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.interop import load_published, to_published
from sdit.interop.moe_names import published_expert_name, without_moe_names
from sdit.model import DiffusionTransformer, build_model
from sdit.model.balance import token_balance_loss, updated_bias
from sdit.model.moe.token_local import LocalTokenPass
from sdit.model.moe.token_moe import TokenMoe
from sdit.model.moe.token_routes import TokenStatistics

DATA = Path(__file__).parents[2] / "data"
LAYERS = np.load(DATA / "recipe_moe_layers.npz")
CASES = ("dit_moe", "dsmoe", "expert_choice", "token_mlp", "sigmoid_aux", "capacity")
MODELS = pytest.mark.parametrize("name", ["recipe_dit_moe", "recipe_dsmoe", "recipe_ec_dit"])


def _distance(ours: Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours.detach() - reference).norm() / reference.norm())


def _views(module: torch.nn.Module, prefix: str, gradient: bool = False) -> dict[str, Tensor]:
    """Return the parameters, or their gradients, by published name, one matrix per expert."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        value = parameter.grad if gradient else parameter.detach()
        if value is None:
            continue
        if published_expert_name(f"{prefix}{name}", 0) is None:
            found[f"{prefix}{name}"] = value
            continue
        for expert, row in enumerate(value):
            found[str(published_expert_name(f"{prefix}{name}", expert))] = row.mT if row.dim() == 2 else row
    return found


def _layer(name: str) -> tuple[TokenMoe, dict[str, Any]]:
    config = json.loads(str(LAYERS[f"{name}.config"]))
    layer = TokenMoe(ModelConfig(width=24, heads=2, moe=config))
    prefix = "blocks.0.moe."
    weights = {key: LAYERS[key] for key in LAYERS.files if key.startswith(f"{name}.w.")}
    targets = _views(layer, prefix)
    assert targets.keys() == {prefix + key.removeprefix(f"{name}.w.") for key in weights}
    for key, values in weights.items():
        targets[prefix + key.removeprefix(f"{name}.w.")].copy_(torch.from_numpy(values))
    return layer, config


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_reference(name: str) -> None:
    layer, config = _layer(name)
    x = torch.from_numpy(LAYERS[f"{name}.x"]).requires_grad_()
    tokens = LocalTokenPass()
    choice, routes, _ = layer.gate(x)
    y, fields = layer(x, 0, tokens)
    statistics = TokenStatistics(*(each[None] for each in fields))
    losses = {scope: token_balance_loss(statistics, scope) for scope in ("batch", "sample")}
    aux = losses["batch"] * (config["aux_weight"] if config["balance"] == "aux" else 0)
    (y.square().mean() + aux).backward()

    assert _distance(y, LAYERS[f"{name}.out"]) < 1e-4
    assert x.grad is not None and _distance(x.grad, LAYERS[f"{name}.grad_x"]) < 1e-4
    assert aux.item() == pytest.approx(float(LAYERS[f"{name}.aux"]), rel=1e-5)
    assert np.array_equal(choice.chosen, LAYERS[f"{name}.chosen"])
    gradients = _views(layer, "blocks.0.moe.", gradient=True)
    held = [key for key in LAYERS.files if key.startswith(f"{name}.grad_norm.")]
    assert held
    for key in held:
        norm = gradients["blocks.0.moe." + key.removeprefix(f"{name}.grad_norm.")].norm().item()
        assert norm == pytest.approx(float(LAYERS[key]), rel=1e-4), key
    _check_choices(name, config, routes.weights.view(*x.shape[:2], -1), choice.kept, losses)
    if f"{name}.counts" in LAYERS:
        assert fields.counts.sum(0).tolist() == LAYERS[f"{name}.counts"].tolist()


def _check_choices(name: str, config: dict[str, Any], weights: Tensor, kept: Tensor, losses: dict[str, Tensor]) -> None:
    chosen = torch.from_numpy(LAYERS[f"{name}.chosen"])
    axis = 1 if config["router"] == "expert_choice" else 2
    index = chosen.mT if axis == 1 else chosen
    wanted_kept = torch.ones(chosen.shape, dtype=torch.bool)
    if f"{name}.kept" in LAYERS:
        wanted_kept = torch.from_numpy(LAYERS[f"{name}.kept"])
        assert int((~wanted_kept).sum()) == int(LAYERS[f"{name}.dropped"])
    ours, ours_kept = weights.gather(axis, index), kept.gather(axis, index)
    if axis == 1:
        ours, ours_kept = ours.mT, ours_kept.mT
    assert torch.equal(ours_kept, wanted_kept)
    assert _distance(ours, LAYERS[f"{name}.weights"] * wanted_kept.numpy()) < 1e-4
    if f"{name}.limit" in LAYERS:
        assert kept.sum(1).max() <= int(LAYERS[f"{name}.limit"])
    for scope, loss in losses.items():
        if f"{name}.aux_{scope}" in LAYERS:
            assert loss.item() == pytest.approx(float(LAYERS[f"{name}.aux_{scope}"]), rel=1e-5)


def test_bias_updates_equal_reference() -> None:
    counts, wanted, rate = (LAYERS[f"bias_update.{key}"] for key in ("counts", "bias", "rate"))
    bias = torch.from_numpy(wanted[0]).float()
    for step, each in enumerate(counts):
        bias = updated_bias(bias, torch.from_numpy(each), float(rate))
        assert torch.allclose(bias.double(), torch.from_numpy(wanted[step + 1]), rtol=0, atol=1e-8)


def _load(name: str) -> tuple[DiffusionTransformer, Any, dict[str, np.ndarray]]:
    numbers = np.load(DATA / f"{name}.npz")
    model = build_model(json.loads(str(numbers["meta"])))
    weights = {key[2:]: numbers[key] for key in numbers.files if key.startswith("w.")}
    load_published(model, weights)
    return model, numbers, weights


@MODELS
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("time", "out"), [("t", "out.eval"), ("t_flow", "out.flow")])
def test_model_equals_reference(name: str, mode: str, time: str, out: str) -> None:
    model, numbers, _ = _load(name)
    chosen: list[Tensor] = []
    for block in model.blocks:
        block.moe.gate.register_forward_hook(lambda _module, _inputs, result: chosen.append(result[0].chosen))  # type: ignore[union-attr]
    x, t, y = (torch.from_numpy(numbers[f"in.{key}"]) for key in ("x", time, "y"))
    output = model.train(mode == "train")(x, t, y)
    assert _distance(output.prediction, numbers[out]) < 1e-4
    if time == "t":
        assert np.array_equal(torch.stack(chosen), numbers["out.chosen"])
        assert output.aux_loss is not None
        assert output.aux_loss.item() == pytest.approx(float(numbers["out.aux_loss"]), rel=1e-5)


@MODELS
def test_gradients_of_a_model_equal_reference(name: str) -> None:
    model, numbers, _ = _load(name)
    output = model(*(torch.from_numpy(numbers[f"in.{key}"]) for key in ("x", "t", "y")))
    (output.prediction.square().mean() + output.aux_loss).backward()
    gradients = _views(model, "", gradient=True)
    held = [key.removeprefix("grad_norm.") for key in numbers.files if key.startswith("grad_norm.")]
    assert held
    for key in held:
        (ours,) = without_moe_names(model.config, {key: torch.zeros(0)})
        norm = gradients[ours].norm().item()
        assert norm == pytest.approx(float(numbers[f"grad_norm.{key}"]), rel=1e-4), key


@MODELS
def test_published_names_give_the_same_model_back(name: str) -> None:
    model, _, weights = _load(name)
    published = to_published(model)
    assert published.keys() - {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"} == (
        without_moe_names(model.config, {key: torch.from_numpy(each) for key, each in weights.items()}).keys()
        - {"pos_embed"}
    )
    again = build_model(model.config)
    load_published(again, published)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
