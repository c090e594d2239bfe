"""The networks reproduce numbers of an independent implementation (tests/data/README.md; its tolerances)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdit.interop import load_published
from sdit.model import DiffusionTransformer, build_model, forward_with_guidance, prior_loss
from sdit.model.windows import channel_windows, expert_windows

DATA = Path(__file__).parents[2] / "data"


def _load(name: str) -> tuple[DiffusionTransformer, Any, tuple[torch.Tensor, ...]]:
    numbers = np.load(DATA / f"{name}.npz")
    meta = json.loads(str(numbers["meta"]))
    shape = {"depth": meta["depth"], "width": meta["hid"], "heads": meta["heads"], "patch_size": meta["patch"]}
    image = {"input_size": meta["inp"], "channels": meta["C"], "classes": meta["ncls"]}
    model = build_model({"variant": "dtr" if name == "dtr" else "switch"} | shape | image)
    weights = {key[2:]: torch.from_numpy(numbers[key]) for key in numbers.files if key.startswith("w.")}
    load_published(model, weights)
    return model, numbers, tuple(torch.from_numpy(numbers[f"in.{key}"]) for key in "xty")


def _distance(ours: torch.Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours.detach() - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", ["switch_dit", "dtr"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_equals_reference(name: str, mode: str) -> None:
    model, numbers, inputs = _load(name)
    output = model.train(mode == "train")(*inputs)
    assert _distance(output.prediction, numbers[f"out.{mode}"]) < 1e-4


@pytest.mark.parametrize("name", ["switch_dit", "dtr"])
def test_gradients_and_prior_loss_equal_reference(name: str) -> None:
    model, numbers, (x, t, y) = _load(name)
    prior = prior_loss(model, t)
    assert prior.item() == pytest.approx(float(numbers["out.prior_loss"]), rel=1e-5)
    (model(x, t, y).prediction.square().mean() + prior).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(float(numbers[f"grad_norm.{key}"]), rel=1e-4), key


@pytest.mark.parametrize("name", ["switch_dit", "dtr"])
def test_guidance_equals_reference(name: str) -> None:
    model, numbers, (x, t, y) = _load(name)
    guided = forward_with_guidance(model, x, t, y, 1.5)
    conditional_rows, null_rows = np.split(numbers["out.cfg_1_5"], 2)
    assert _distance(guided, conditional_rows) < 1e-4
    # the reference repeats the guided mean in its second half, beside the null label's variance
    assert _distance(guided[:, :4], null_rows[:, :4]) < 1e-4


def test_routes_of_all_tasks_equal_reference() -> None:
    model, numbers, _ = _load("switch_dit")
    probs = model.all_gate_probs()
    assert _distance(probs, numbers["out.gate_probs"]) < 1e-5
    assert np.array_equal(probs.topk(2).indices.numpy(), numbers["out.topk"])


def test_masks_equal_reference() -> None:
    switch, switch_numbers, _ = _load("switch_dit")
    dtr, dtr_numbers, _ = _load("dtr")
    assert np.array_equal(expert_windows(switch.config).mask, switch_numbers["prior.mask"])
    assert np.array_equal(channel_windows(dtr.config).mask, dtr_numbers["dtr.mask"])
    assert np.array_equal(dtr.channel_mask.numpy(), dtr_numbers["dtr.mask"])
