"""`from_pretrained(save_pretrained(model))` is the same function, and bad folders give one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from written_run import random_model, tiny_config, write_run

from sdit.checkpoint.export_folder import export_pretrained
from sdit.checkpoint.load import load_trained
from sdit.errors import CheckpointError, ConfigError, SditError
from sdit.model import DiffusionTransformer, build_model

VARIANTS = {
    "dit": ("model.variant=dit",),
    "dtr": ("model.variant=dtr",),
    "switch": ("model.variant=switch",),
    "switch, mlp": ("model.experts.kind=mlp", "model.experts.count=4"),
    "unconditional": ("model.classes=0", "model.learn_variance=false"),
}


def predict(model: DiffusionTransformer) -> Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, config.channels, config.input_size, config.input_size, generator=generator)
    t = torch.linspace(0, config.timesteps - 1, 6).long()
    with torch.no_grad():
        return model(x, t, torch.arange(6) % (config.classes + 1) if config.classes else None).prediction


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_loads_as_the_same_function(tmp_path: Path, variant: str) -> None:
    model = random_model(tiny_config(*VARIANTS[variant]), 3)
    assert model.save_pretrained(tmp_path / "out") is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = DiffusionTransformer.from_pretrained(tmp_path / "out")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(predict(loaded), predict(model))
    assert torch.equal(predict(DiffusionTransformer.from_pretrained(str(tmp_path / "out"))), predict(model))


@pytest.mark.parametrize("weights", ["ema", "weight"])
def test_an_exported_folder_loads_and_its_card_states_the_run(tmp_path: Path, weights: Any) -> None:
    run = tmp_path / "run"
    models = write_run(run, tiny_config("model.variant=switch", "optimizer.learning_rate=0.002"))
    (run / "environment.json").write_text(json.dumps({"git_commit": "abc123", "sdit": "9.9"}))
    lines = [{"images_seen": n, "validation_loss": loss} for n, loss in ((12, 0.5), (24, 0.25), (36, 0.125))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = {"fid": 3.5, "kid": None, "recall": 0.25, "images": {"count": 1234}, "reference": {"name": "/data/digits"}}
    (run / "scores").mkdir()
    (run / "scores" / "final.json").write_text(json.dumps(score))
    rounded = {**score, "fid": 4.5, "drawn": {"precision": "bf16"}}
    (run / "scores" / "rounded.json").write_text(json.dumps(rounded))
    export_pretrained(run, tmp_path / "out", weights, torch.float32)
    loaded = DiffusionTransformer.from_pretrained(tmp_path / "out")
    assert torch.equal(predict(loaded), predict(models[weights]))
    assert torch.equal(predict(load_trained(tmp_path / "out" / "model.safetensors", weights).model), predict(loaded))
    card = (tmp_path / "out" / "README.md").read_text()
    kind = {"ema": "averaged (ema)", "weight": "last"}[weights]
    for words in (
        "library_name: sdit",
        "# Switch-DiT, 4x4x1",
        f"The weights are the {kind} ones after 28 images (7 steps).",
        "The training data are unknown (5 classes).",
        "learning_rate: 0.002",
        "held-out loss 0.25, measured after 24 images",
        "fid 3.5, recall 0.25: 1,234 images against digits (`final.json`)",
        "fid 4.5, recall 0.25: 1,234 images sampled in bf16 against digits (`rounded.json`)",
        "Commit abc123 of sdit, version 9.9.",
    ):
        assert words in card, (words, card)


def test_bfloat16_folders_load_in_float32(tmp_path: Path) -> None:
    models = write_run(tmp_path / "run", tiny_config())
    export_pretrained(tmp_path / "run", tmp_path / "out", "ema", torch.bfloat16)
    loaded = DiffusionTransformer.from_pretrained(tmp_path / "out")
    expected = dict(models["ema"].named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16().float()), name


def test_a_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="out: already exists; legal: a new or an empty folder"):
        export_pretrained(tmp_path / "run", tmp_path / "out", "ema", torch.float32)
    assert [path.name for path in tmp_path.iterdir()].count("out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def damage(folder: Path, kind: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "short":
        weights.write_bytes(weights.read_bytes()[:-3])
    if kind == "no weights":
        weights.unlink()
    if kind == "no config":
        config.unlink()
    if kind == "config":
        config.write_text("{")
    if kind == "key":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"depths": 3}))
    if kind == "depth":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"depth": 3}))
    if kind == "infinite":
        save_file(
            {name: value / 0 if name.startswith("x_") else value for name, value in load_file(weights).items()}, weights
        )


DAMAGES: dict[str, tuple[type[SditError], str]] = {
    "short": (CheckpointError, r"model\.safetensors: its tensors end at byte"),
    "no weights": (CheckpointError, r"model\.safetensors: no such file"),
    "no config": (CheckpointError, r"config\.json: no such file"),
    "config": (CheckpointError, r"config\.json: is incomplete or not JSON"),
    "key": (ConfigError, r"config\.json: model\.depths"),
    "depth": (ConfigError, r"out: model: the checkpoint does not contain blocks\.2\.attn"),
    "infinite": (CheckpointError, r"model\.safetensors: x_embedder.* hold NaN or infinite numbers"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_gives_one_line(tmp_path: Path, kind: str) -> None:
    random_model(tiny_config(), 3).save_pretrained(tmp_path / "out")
    damage(tmp_path / "out", kind)
    error, message = DAMAGES[kind]
    with pytest.raises(error, match=message) as caught:
        DiffusionTransformer.from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c"])
def test_a_name_that_is_no_folder_gives_one_line(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; legal: a folder, or a Hub id such as OWNER/NAME"):
        DiffusionTransformer.from_pretrained(name)


def test_a_hub_id_is_looked_up_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"someone/model: no such folder, and cannot be downloaded") as caught:
        DiffusionTransformer.from_pretrained("someone/model", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_several_files_with_an_index_load(tmp_path: Path) -> None:
    model = random_model(tiny_config("model.variant=dtr"), 3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(predict(DiffusionTransformer.from_pretrained(tmp_path)), predict(model))


def test_a_model_without_a_run_has_a_card_with_given_facts(tmp_path: Path) -> None:
    model = build_model(tiny_config().model)
    model.save_pretrained(tmp_path, model_card_kwargs={"data": "The embedded digits.", "commit": "Commit 1."})
    card = (tmp_path / "README.md").read_text()
    assert "The embedded digits." in card and "Commit 1." in card and "No score is known." in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_package_and_the_commands_do_not_import_the_hub() -> None:
    code = "import sys, sdit, sdit.config, sdit.cli; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
