"""Backbone options reproduce numbers of an independent implementation (tests/data/README.md; its tolerances)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.interop import FLOW_MODEL, convert_flow_weights, load_published, to_published
from sdit.model import DiffusionTransformer, build_model
from sdit.model.embedding import grid_positions
from sdit.model.rope import rope_tables

DATA = Path(__file__).parents[2] / "data"
FILES = (
    "recipe_lightning", "recipe_rms_qknorm", "recipe_layer_qknorm", "recipe_switch_lightning", "recipe_switch_rope",
    "recipe_upcycle",
)  # fmt: skip
RECIPES = pytest.mark.parametrize("name", FILES)


def _weights(numbers: Any) -> dict[str, np.ndarray]:
    return {key[2:]: numbers[key] for key in numbers.files if key.startswith("w.")}


def _load(name: str) -> tuple[DiffusionTransformer, Any]:
    numbers = np.load(DATA / f"{name}.npz")
    model = build_model(json.loads(str(numbers["meta"])))
    load_published(model, _weights(numbers))
    return model, numbers


def _inputs(numbers: Any, time: str = "t") -> tuple[Tensor, Tensor, Tensor]:
    x, t, y = (torch.from_numpy(numbers[f"in.{key}"]) for key in ("x", time, "y"))
    return x, t, y


def _distance(ours: Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours.detach() - reference).norm() / reference.norm())


@RECIPES
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("time", "out"), [("t", "out.eval"), ("t_flow", "out.flow")])
def test_forward_equals_reference(name: str, mode: str, time: str, out: str) -> None:
    model, numbers = _load(name)
    output = model.train(mode == "train")(*_inputs(numbers, time))
    assert _distance(output.prediction, numbers[out]) < 1e-4
    assert output.aux_loss is None


@RECIPES
def test_gradients_equal_reference(name: str) -> None:
    model, numbers = _load(name)
    model(*_inputs(numbers)).prediction.square().mean().backward()
    held = {key.removeprefix("grad_norm.") for key in numbers.files if key.startswith("grad_norm.")}
    parameters = dict(model.named_parameters())
    assert held <= parameters.keys() and (held or name == "recipe_upcycle")
    for key in held:
        gradient, wanted = parameters[key].grad, float(numbers[f"grad_norm.{key}"])
        assert gradient is not None
        if wanted == 0:  # in theory; rounding leaves something
            assert gradient.norm() < 1e-6
        else:
            assert gradient.norm().item() == pytest.approx(wanted, rel=1e-4), key


def test_published_flow_weights_predict_our_velocity_at_our_time() -> None:
    numbers = np.load(DATA / "recipe_lightning.npz")
    model = build_model(json.loads(str(numbers["meta"])) | FLOW_MODEL)
    load_published(model, convert_flow_weights(_weights(numbers), "lightningdit"))
    output = model(*_inputs(numbers, "t_flow"))
    assert _distance(output.prediction, numbers["out.published_flow"]) < 1e-4


@RECIPES
def test_names_and_tables_come_back(name: str) -> None:
    model, numbers = _load(name)
    given, published = _weights(numbers), to_published(model)
    tables = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin", "full_time", "prior._unit_mapping"}
    assert given.keys() <= published.keys() and published.keys() - given.keys() <= tables
    for key, values in given.items():
        exact = key != "pos_embed" and not key.startswith("feat_rope.")
        assert np.abs(published[key].numpy() - values).max() <= (0 if exact else 1e-5), key


@pytest.mark.parametrize("side", [6, 8])
@pytest.mark.parametrize("base", [None, 4])
def test_tables_of_another_resolution_equal_reference(side: int, base: int | None) -> None:
    numbers = np.load(DATA / "recipe_upcycle.npz")
    meta = json.loads(str(numbers["meta"]))
    suffix = f"side{side}" + (f"_base{base}" if base else "")
    ours = {f"positions.{suffix}": grid_positions(side, meta["width"], base)[0]}
    tables = rope_tables(side, meta["width"] // meta["heads"], base)
    ours |= {f"rope_{kind}.{suffix}": table for kind, table in zip(("cos", "sin"), tables, strict=True)}
    compared = [key for key in ours if key in numbers.files]
    assert len(compared) == (3 if base else 1)
    for key in compared:
        assert np.abs(ours[key].numpy() - numbers[key]).max() < 1e-5, key
