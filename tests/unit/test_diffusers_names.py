"""diffusers' names and configs of a DiT are read and written (recipe, section H)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdit.errors import CheckpointError, ConfigError, SditError
from sdit.interop import load_published, read_weights, to_published
from sdit.interop.diffusers import read_diffusers_config, read_diffusers_folder
from sdit.interop.diffusers_config import diffusers_config, model_config_of
from sdit.interop.diffusers_names import from_diffusers_names, to_diffusers_names
from sdit.interop.safetensors_index import read_safetensors, read_safetensors_index
from sdit.model import build_model, parse_model_config

VECTORS = np.load(Path(__file__).parents[1] / "data" / "recipe_diffusers.npz")
WEIGHTS = {name.removeprefix("d."): torch.from_numpy(VECTORS[name]) for name in VECTORS.files if name.startswith("d.")}
CONFIG: dict[str, Any] = json.loads(str(VECTORS["transformer_config"]))
MODEL = parse_model_config(json.loads(str(VECTORS["meta"])))


def write_folder(folder: Path, config: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    save_file(WEIGHTS if weights is None else weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def relative_error(found: Tensor, expected: str) -> float:
    wanted = torch.from_numpy(VECTORS[expected]).double()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_weights_of_diffusers_compute_dits_function(tmp_path: Path, inner: str) -> None:
    write_folder(tmp_path / "pipeline" / inner)
    model = build_model(read_diffusers_config(tmp_path / "pipeline")).eval()
    assert model.config == MODEL
    load_published(model, read_diffusers_folder(tmp_path / "pipeline"))
    with torch.no_grad():
        output = model(*(torch.from_numpy(VECTORS[f"in.{name}"]) for name in "xty")).prediction
    assert relative_error(output, "out.eval") < 1e-4
    assert relative_error(output, "out.diffusers") > 0.01  # diffusers computes another function


def test_names_are_a_round_trip() -> None:
    model = build_model(MODEL, seed=3)
    published = to_published(model)
    theirs = to_diffusers_names(published)
    assert theirs.keys() == WEIGHTS.keys()
    assert {name: value.shape for name, value in theirs.items()} == {n: v.shape for n, v in WEIGHTS.items()}
    back = from_diffusers_names(theirs)
    assert all(torch.equal(back[name], published[name]) for name in back)
    assert back.keys() == published.keys() - {"pos_embed"}


def test_configs_are_a_round_trip() -> None:
    ours = diffusers_config(MODEL)
    assert ours == {key: value for key, value in CONFIG.items() if key != "_diffusers_version"} | {"norm_eps": 1e-6}
    for values in (
        {},
        {"variant": "dtr", "classes": 0, "dtr": {"alpha": 2.0, "beta": 0.5}},
        {"variant": "switch", "timesteps": 50, "experts": {"count": 5, "top_k": 3, "kind": "mlp"}},
        {"variant": "dit", "mlp_ratio": 2.0, "learn_variance": False},
    ):
        config = parse_model_config({"depth": 2, "width": 48, "heads": 3, "input_size": 8} | values)
        assert model_config_of(diffusers_config(config)) == config


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"_class_name": "UNet2DModel"}, "_class_name: UNet2DModel is not a DiT; legal: DiT"),
    "activation": ({"activation_fn": "swish"}, "activation_fn: 'swish' is not DiT's; legal: 'gelu-approximate'"),
    "no depth": ({"num_layers": None}, "num_layers: None is not legal; legal: a whole number"),
    "channels": ({"out_channels": 5}, "out_channels: 5 for in_channels 4; legal: 4, 8"),
    "patch": ({"patch_size": 3}, "model.input_size: 8 is not a multiple of patch_size 3"),
    "width": (
        {"attention_head_dim": 32},
        r"x_embedder.proj.weight is of shape \(48, 4, 2, 2\); legal: \(96, 4, 2, 2\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_does_not_fit_gives_one_line(tmp_path: Path, case: str) -> None:
    change, message = BAD_CONFIGS[case]
    folder = write_folder(tmp_path / "dit", CONFIG | change)
    with pytest.raises(ConfigError, match=message) as caught:
        read_diffusers_folder(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_do_not_fit_give_one_line(tmp_path: Path) -> None:
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    cases = {
        f"{table} differs from the copy in another block": WEIGHTS | {table: WEIGHTS[table] + 1e-6},
        "head.weight are not names of DiT": WEIGHTS | {"head.weight": torch.zeros(2)},
        "blocks.0.attn.qkv.bias needs attn1.to_k": {
            name: value for name, value in WEIGHTS.items() if name != "transformer_blocks.0.attn1.to_k.bias"
        },
    }
    for number, (message, weights) in enumerate(cases.items()):
        folder = write_folder(tmp_path / str(number), weights=weights)
        with pytest.raises(ConfigError, match=message):
            read_diffusers_folder(folder)
    with pytest.raises(ConfigError, match=r"routers\.0\.experts\.w have no name in DiTTransformer2DModel"):
        to_diffusers_names({"routers.0.experts.w": torch.zeros(1)})


def test_damaged_and_missing_files_give_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        read_diffusers_folder(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "dit")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: "):
        read_diffusers_folder(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        read_diffusers_folder(folder)
    (folder / "config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"config\.json: is incomplete or not JSON"):
        read_diffusers_folder(folder)


def write_shards(folder: Path, index: str = "diffusion_pytorch_model.safetensors.index.json") -> Path:
    """Replace the weights of a folder by two shards and an index, as huggingface's libraries write them."""
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(WEIGHTS)
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, held in files.items():
        save_file({name: WEIGHTS[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder / index


def test_sharded_weights_equal_those_of_one_file(tmp_path: Path) -> None:
    expected = read_diffusers_folder(write_folder(tmp_path / "one"))
    index = write_shards(write_folder(tmp_path / "shards"))
    found = read_diffusers_folder(tmp_path / "shards")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert read_safetensors_index(index).keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": "../outside.safetensors"},
            "x is in '../outside.safetensors'; legal: a .safetensors file in the same folder",
        ),
        ({"x": 3}, "x is in '3'; legal: a .safetensors file in the same folder"),
        ({"x": "model-00001-of-00002.safetensors"}, r"model-00001-of-00002.safetensors: does not contain x; legal"),
        ({"x": "gone.safetensors"}, r"gone.safetensors: no such file"),
        (None, "weight_map is not a mapping of tensors to files"),
    ],
)
def test_an_index_that_does_not_fit_gives_one_line(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    index = write_shards(write_folder(tmp_path / "shards"))
    stored = json.loads(index.read_text())
    stored["weight_map"] = None if change is None else stored["weight_map"] | change
    index.write_text(json.dumps(stored))
    with pytest.raises(SditError, match=message) as caught:
        read_safetensors_index(index)
    assert "\n" not in str(caught.value)


def test_a_shard_with_more_than_the_index_lists_is_refused(tmp_path: Path) -> None:
    index = write_shards(write_folder(tmp_path / "shards"))
    stored = json.loads(index.read_text())
    del stored["weight_map"][min(WEIGHTS)]
    index.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=f"also holds {min(WEIGHTS)}; legal: the tensors that"):
        read_safetensors_index(index)


def test_one_byte_floats_are_read_unless_one_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    numbers = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    save_file({"w": numbers}, path)
    assert torch.equal(read_safetensors(path)["w"].float(), numbers.float())
    save_file({"w": torch.full((2,), torch.nan).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: w holds NaN or infinite numbers"):
        read_safetensors(path)


def test_an_older_folder_with_a_pickle_is_read(tmp_path: Path) -> None:
    """The folders of the first DiT pipelines: another class name, keys of other models, a .bin file."""
    others = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "num_vector_embeds": None}
    folder = write_folder(tmp_path / "dit", {k: v for k, v in CONFIG.items() if k != "norm_eps"} | others)
    expected = read_diffusers_folder(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(WEIGHTS, folder / "diffusion_pytorch_model.bin")
    found = read_diffusers_folder(folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert read_diffusers_config(folder) == MODEL


@pytest.mark.parametrize("way", ["names", "file"])
def test_names_of_diffusers_are_read_without_a_folder(tmp_path: Path, way: str) -> None:
    model = build_model(MODEL).eval()
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    load_published(model, WEIGHTS if way == "names" else read_weights(tmp_path / "a.safetensors"))
    expected = from_diffusers_names(WEIGHTS)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
