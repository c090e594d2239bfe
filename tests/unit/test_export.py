"""Trained weights leave under published names and come back as the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from written_run import random_model, tiny_config, write_run

from sdit.checkpoint.export import export_pickle, export_safetensors, tensor_entry, write_safetensors
from sdit.checkpoint.files import write_manifest
from sdit.checkpoint.load import load_model, load_trained
from sdit.config import dump_config
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import load_published, read_published_file, to_published
from sdit.model import DiffusionTransformer, build_model

VARIANTS = {
    "dit": ("model.variant=dit",),
    "dtr": ("model.variant=dtr",),
    "switch": ("model.variant=switch",),
    "switch, mlp": ("model.experts.kind=mlp", "model.experts.count=4"),
    "tokens": ("model.moe={experts: 4, shared: 1, hidden_ratio: 2, balance: bias}", "model.variant=dit"),
    "tokens, mlp": ("model.moe={experts: 3, kind: mlp, router: expert_choice, every: 2}", "model.activation=silu"),
    "unconditional": ("model.classes=0", "model.learn_variance=false"),
}
EXPORTS: dict[str, Any] = {"run.safetensors": export_safetensors, "run.pt": export_pickle}


def predict(model: DiffusionTransformer) -> Tensor:
    """Predictions for fixed images, times over the whole range and labels."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    x = torch.randn(6, config.channels, config.input_size, config.input_size, generator=generator)
    t = torch.linspace(0, config.timesteps - 1, 6).long()
    y = torch.arange(6) % (config.classes + 1)
    with torch.no_grad():
        return model(x, t, y if config.classes else None).prediction


@pytest.mark.parametrize("weights", ["ema", "weight"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_loads_as_the_model_that_was_saved(tmp_path: Path, variant: str, weights: Any) -> None:
    config = tiny_config(*VARIANTS[variant])
    models = write_run(tmp_path, config)
    trained = load_model(tmp_path, weights)
    assert trained.config == config and trained.clock.images_seen == 28 and trained.clock.steps == 7
    assert not trained.model.training
    assert torch.equal(predict(trained.model), predict(models[weights]))


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("weights", ["ema", "weight"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_model_predicts_the_same(tmp_path: Path, variant: str, weights: Any, name: str) -> None:
    config = tiny_config(*VARIANTS[variant])
    expected = predict(write_run(tmp_path, config)[weights])
    EXPORTS[name](tmp_path, tmp_path / name, weights, torch.float32)
    by_hand = build_model(config.model, seed=9).eval()
    load_published(by_hand, read_published_file(tmp_path / name))
    assert torch.equal(predict(by_hand), expected)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    again = load_trained(tmp_path / name, weights, tmp_path / "run.yaml")
    assert torch.equal(predict(again.model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_holds_what_published_code_expects(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    models = write_run(tmp_path, tiny_config(*VARIANTS[variant]))
    export_safetensors(tmp_path, tmp_path / "run.safetensors", "ema", dtype)
    expected, stored = to_published(models["ema"]), load_file(tmp_path / "run.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(stored[name], value.to(dtype) if value.is_floating_point() else value), name


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    config = tiny_config()
    models = write_run(tmp_path, config)
    path = tmp_path / "run.safetensors"
    export_safetensors(tmp_path, path, "ema", torch.float32)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert (facts["variant"], facts["weights"], facts["images_seen"]) == ("switch", "ema", "28")
    assert json.loads(facts["config"]) == config.model_dump(mode="json")
    alone = load_trained(path)
    assert alone.config == config and alone.clock.images_seen == 28
    assert torch.equal(predict(alone.model), predict(models["ema"]))
    with pytest.raises(ConfigError, match=r"--weights: weight, but .* legal: ema"):
        load_trained(path, "weight")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    def broken() -> Any:
        yield torch.zeros(2)
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=r"run\.safetensors: cannot be written \(No space left"):
        write_safetensors(path, [tensor_entry("w", torch.float32, (4,), broken)], {})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_export_holds_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdit.checkpoint.export as module

    write_run(tmp_path, tiny_config("model.experts.count=8"))
    largest = 0

    def noted(target: Tensor, *rest: Any) -> None:
        nonlocal largest
        largest = max(largest, target.numel())
        fill_tensor(target, *rest)

    fill_tensor = module.fill_tensor
    monkeypatch.setattr(module, "fill_tensor", noted)
    export_safetensors(tmp_path, tmp_path / "run.safetensors", "ema", torch.float32)
    dense = max(p.numel() for name, p in random_model(tiny_config(), 0).named_parameters() if ".experts." not in name)
    assert largest == dense


def test_a_path_that_holds_no_model_is_named(tmp_path: Path) -> None:
    config = tiny_config()
    write_run(tmp_path, config)
    with pytest.raises(CheckpointError, match="nowhere: holds no checkpoint"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"--config: .* already has a config"):
        load_trained(tmp_path, config=tmp_path / "run.yaml")
    export_pickle(tmp_path, tmp_path / "run.pt", "ema", torch.float32)
    with pytest.raises(ConfigError, match="--config: is not set"):
        load_trained(tmp_path / "run.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=r"torn\.safetensors: cannot be read"):
        load_trained(tmp_path / "torn.safetensors")


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, tiny_config())
    folder = next((tmp_path / "checkpoints").iterdir())
    text = (folder / "manifest.json").read_text()
    # A manifest of the same format whose config asks for one more block than the shards hold.
    body = json.loads(text)["body"]
    body["config"]["model"]["depth"] = 3
    write_manifest(folder, body)
    with pytest.raises(CheckpointError, match=r"ema/model\.blocks\.2\..*: the model needs shape .*, it is missing"):
        load_trained(tmp_path)
