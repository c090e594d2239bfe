"""What a model takes of weights of another model: dense into Switch-DiT, other positions, other classes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from written_run import tiny_config, write_run

from sdit.clock import Clock
from sdit.config import Config, TrainConfig
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import FLOW_MODEL, load_published, read_weights, to_published, write_published_file
from sdit.interop.flow_weights import DATA_AT_ONE
from sdit.model import DiffusionTransformer, build_experts, build_model
from sdit.model.embedding import grid_positions
from sdit.model.freezing import freeze
from sdit.train.initial_weights import InitialWeights, read_initial_weights
from sdit.train.resume import Resumed, describe_resume

DATA = Path(__file__).parents[1] / "data"
SMALL = {"depth": 2, "width": 16, "heads": 2, "input_size": 4, "channels": 3, "classes": 5, "timesteps": 50}
LABELS = "y_embedder.embedding_table.weight"


def random_model(**overrides: Any) -> DiffusionTransformer:
    model = build_model(SMALL | overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def copy_into(model: DiffusionTransformer, tensors: dict[str, Tensor], *allowed: str) -> str:
    return InitialWeights(tensors, "FILE", allowed).copy_into(model)


def one_rank(**answers: Any) -> Any:
    """The calls of a process group that reading makes; `others` are the answers of the other ranks."""
    return SimpleNamespace(gather=lambda mine: [mine, *answers.get("others", [])])


@pytest.fixture(scope="module")
def vector() -> dict[str, np.ndarray]:
    with np.load(DATA / "recipe_upcycle.npz") as stored:
        return {name: stored[name] for name in stored.files}


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    difference = np.linalg.norm(ours.detach().numpy().astype(np.float64) - theirs)
    return float(difference / np.linalg.norm(theirs))


@pytest.mark.parametrize("kind", ["dense", "linear", "mlp"])
def test_upcycled_model_is_the_dense_model(vector: dict[str, np.ndarray], kind: str) -> None:
    """Reference outputs at 1e-4; and the outputs of the upcycled model have the bits of the dense one's."""
    published = {name.removeprefix("w."): torch.from_numpy(v) for name, v in vector.items() if name.startswith("w.")}
    dense = build_model(json.loads(str(vector["meta"]))).eval()
    load_published(dense, published)
    config = json.loads(str(vector["meta"] if kind == "dense" else vector["meta.switch"]))
    if kind != "dense":
        config["experts"]["kind"] = kind
    model = build_model(config, seed=3).eval()
    note = copy_into(model, published)
    assert ("experts and gates are new" in note) == (kind != "dense")
    x, y = torch.from_numpy(vector["in.x"]), torch.from_numpy(vector["in.y"])
    for times, output in (("in.t", "out.eval"), ("in.t_flow", "out.flow")):
        prediction = model(x, torch.from_numpy(vector[times]), y).prediction
        assert relative(prediction, vector[output]) < 1e-4
        assert torch.equal(prediction, dense(x, torch.from_numpy(vector[times]), y).prediction)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_upcycled_model_has_the_dense_models_gradients(vector: dict[str, np.ndarray], kind: str) -> None:
    config = json.loads(str(vector["meta.switch"]))
    config["experts"]["kind"] = kind
    model = build_model(config, seed=3)
    copy_into(model, {n.removeprefix("w."): torch.from_numpy(v) for n, v in vector.items() if n.startswith("w.")})
    inputs = (torch.from_numpy(vector[name]) for name in ("in.x", "in.t", "in.y"))
    model(*inputs).prediction.square().mean().backward()
    norms = {n.removeprefix("grad_norm."): float(v) for n, v in vector.items() if n.startswith("grad_norm.")}
    parameters = dict(model.named_parameters())
    assert norms.keys() == {name for name in parameters if not name.startswith("routers.")}
    for name, norm in norms.items():
        gradient = parameters[name].grad
        assert gradient is not None and gradient.norm().item() == pytest.approx(norm, rel=1e-4), name
    last = "w" if kind == "linear" else "w2"
    gradient = parameters[f"routers.0.experts.{last}"].grad
    assert gradient is not None and gradient.any()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_rank_with_some_experts_starts_as_the_whole_model_does(kind: str) -> None:
    dense = to_published(random_model(variant="dit"))
    whole = build_model(SMALL | {"variant": "switch", "experts": {"count": 3, "kind": kind}})
    part = build_model(whole.config)
    for layer in part.layers:
        assert layer.router is not None
        layer.router.experts = build_experts(part.config.experts, part.config.width, (2, 0))
    for model in (whole, part):
        copy_into(model, dense)
    for (name, ours), (_, all_rows) in zip(part.named_parameters(), whole.named_parameters(), strict=True):
        if ".experts." not in name:
            assert torch.equal(ours, all_rows), name


def test_another_resolution_needs_permission_and_uses_its_own_positions() -> None:
    given = to_published(random_model(input_size=4))
    model = random_model(input_size=8)
    with pytest.raises(
        ConfigError, match=r"train.init_allow: \[\], but its positions are of side 2, the model's of side 4"
    ):
        copy_into(model, given)
    note = copy_into(model, given, "positions")
    assert "its positions are of side 2, the model's of side 4: the model's own are used" in note
    assert torch.equal(model.pos_embed, grid_positions(4, 16))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, given["blocks.1.mlp.fc1.weight"])  # type: ignore[union-attr]


def test_positions_that_are_not_those_of_their_side_are_refused() -> None:
    given = to_published(random_model(input_size=4))
    given["pos_embed"] = given["pos_embed"] + 0.01
    with pytest.raises(ConfigError, match="pos_embed is not the fixed table of side 2"):
        copy_into(random_model(input_size=8), given, "positions")
    given["pos_embed"] = torch.zeros(1, 3, 16)
    with pytest.raises(ConfigError, match=r"pos_embed has shape \(1, 3, 16\); legal: one row per token"):
        copy_into(random_model(input_size=8), given, "positions")


def rotations(side: int, channels: int) -> tuple[Tensor, Tensor]:
    """cos and sin (side², channels) as recipe A writes them: channels 2i, 2i + 1 of an axis turn by coordinate·f_i."""
    axis = channels // 2
    angles = [
        [place * 10000 ** (-2 * (channel // 2) / axis) for place in (row, column) for channel in range(axis)]
        for row in range(side)
        for column in range(side)
    ]
    table = torch.tensor(angles, dtype=torch.float64)
    return table.cos().float(), table.sin().float()


@pytest.mark.parametrize("name", ["feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_rotations_of_another_side_are_checked(name: str) -> None:
    pytest.importorskip("sdit.model.rope")
    given = to_published(random_model(input_size=4, rope=True))
    assert torch.allclose(given[name], rotations(2, 8)[name.endswith("sin")], atol=1e-6)
    copy_into(random_model(input_size=8, rope=True), given, "positions")
    given[name] = given[name].flip(0)
    with pytest.raises(ConfigError, match=f"{name} is not the fixed table of side 2"):
        copy_into(random_model(input_size=8, rope=True), given, "positions")


def test_a_model_with_scaled_positions_starts_another_resolution() -> None:
    given = to_published(random_model(rope=True, position_base=6))
    model = random_model(rope=True, position_base=6, input_size=8)
    copy_into(model, given, "positions")
    assert torch.equal(model.pos_embed, grid_positions(4, 16, 6))
    with pytest.raises(ConfigError, match=r"pos_embed is not the fixed table of side 2; legal: .* or scaled to 5"):
        copy_into(random_model(rope=True, position_base=5, input_size=8), given, "positions")


@pytest.mark.parametrize(("theirs", "ours"), [(5, 9), (9, 5), (5, 0), (0, 5)])
def test_another_number_of_classes_needs_permission_and_draws_the_table_anew(theirs: int, ours: int) -> None:
    given = to_published(random_model(classes=theirs))
    model, fresh = build_model(SMALL | {"classes": ours}, seed=4), build_model(SMALL | {"classes": ours}, seed=4)
    refused = rf"init_allow: \[\], but it has a table of {theirs} classes, model.classes is {ours}; legal: with labels"
    with pytest.raises(ConfigError, match=refused):
        copy_into(model, given)
    note = copy_into(model, given, "labels")
    assert f"it has a table of {theirs} classes, model.classes is {ours}: the label table is drawn anew" in note
    for name, parameter in model.named_parameters():
        expected = dict(fresh.named_parameters())[name] if name == LABELS else given[name]
        assert torch.equal(parameter, expected), name
    if ours:
        assert dict(fresh.named_parameters())[LABELS].std().item() == pytest.approx(0.02, rel=0.5)


def test_the_same_number_of_classes_copies_the_table_although_labels_may_differ() -> None:
    given, model = to_published(random_model()), build_model(SMALL)
    copy_into(model, given, "labels", "positions")
    assert torch.equal(dict(model.named_parameters())[LABELS], given[LABELS])


MISFITS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": ({}, lambda given: given.pop("blocks.0.attn.qkv.bias"), "does not contain blocks.0.attn.qkv.bias"),
    "left over": ({}, lambda given: given.update(more=torch.zeros(1)), "also has more"),
    "shape": (
        {"width": 32},
        lambda given: None,
        r"x_embedder.proj.weight has shape \(16, 3, 2, 2\), not \(32, 3, 2, 2\)",
    ),
    "a gate": ({}, lambda given: given.pop("routers.0.f_gate.1.bias"), "does not contain routers.0.f_gate.1.bias"),
    "experts into dense": ({"variant": "dit"}, lambda given: None, "also has routers.0.f_gate.1.weight"),
    "more experts": ({"experts": {"count": 4}}, lambda given: None, r"routers.0.f_gate.1.weight has shape \(3, 16\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_named_and_nothing_is_copied(case: str) -> None:
    overrides, change, message = MISFITS[case]
    given = to_published(random_model())
    change(given)
    model = build_model(SMALL | overrides)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=message) as caught:
        copy_into(model, given, "positions", "labels")
    assert "\n" not in str(caught.value) and "train.init_from FILE" in str(caught.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def weights_of(path: Path, init_ema: bool = True) -> dict[str, Tensor]:
    found = read_initial_weights(TrainConfig(init_from=str(path), init_ema=init_ema), one_rank())
    assert found is not None
    return found.tensors


@pytest.mark.parametrize("init_ema", [True, False])
def test_every_kind_of_path_gives_the_same_weights(tmp_path: Path, init_ema: bool) -> None:
    models = write_run(tmp_path / "run", tiny_config())
    want = to_published(models["ema" if init_ema else "weight"])
    torch.save({"ema": to_published(models["ema"]), "model": to_published(models["weight"])}, tmp_path / "both.pt")
    torch.save({"model": want}, tmp_path / "model-only.pt")
    write_published_file(tmp_path / "one.safetensors", want, {})
    (tmp_path / "folder").mkdir()
    write_published_file(tmp_path / "folder" / "model.safetensors", want, {})
    checkpoint = tmp_path / "run" / "checkpoints" / "images-000000000028"
    for name in ("run", checkpoint, "both.pt", "model-only.pt", "one.safetensors", "folder"):
        found = weights_of(tmp_path / name, init_ema)
        assert found.keys() == want.keys(), name
        assert all(torch.equal(found[key], want[key]) for key in want), name


def write_index(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors as two files with an index, as huggingface's libraries do."""
    folder.mkdir()
    names = sorted(tensors)
    places = {name: f"model-{1 + number % 2:05d}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_a_safetensors_index_and_its_folder_are_read(tmp_path: Path) -> None:
    pytest.importorskip("sdit.interop.safetensors_index")
    want = to_published(random_model())
    index = write_index(tmp_path / "parts", {f"module.{name}": tensor for name, tensor in want.items()})
    for path in (index, index.parent):
        found = read_weights(path)
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def test_a_diffusers_folder_starts_a_dense_and_an_upcycled_model(tmp_path: Path, part: str) -> None:
    """The reference output of DiT's function at 1e-4, also from the Switch-DiT that starts from the folder."""
    pytest.importorskip("sdit.interop.diffusers")
    with np.load(DATA / "recipe_diffusers.npz") as stored:
        vector = {name: stored[name] for name in stored.files}
    folder = tmp_path / "transformer"
    folder.mkdir()
    tensors = {name.removeprefix("d."): torch.from_numpy(v) for name, v in vector.items() if name.startswith("d.")}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(str(vector["transformer_config"]))
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    given = weights_of(tmp_path if part == "pipeline" else folder)
    config = json.loads(str(vector["meta"]))
    x, t, y = (torch.from_numpy(vector[name]) for name in ("in.x", "in.t", "in.y"))
    for variant in ("dit", "switch"):
        model = build_model(config | {"variant": variant}).eval()
        copy_into(model, given)
        assert relative(model(x, t, y).prediction, vector["out.eval"]) < 1e-4


def test_a_path_that_gives_no_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.init_from: .*/none: no such file or folder; legal: a run"):
        weights_of(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"train.init_from: .*/empty: holds no weights; legal: a run"):
        weights_of(tmp_path / "empty")
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"train.init_from: .*damaged.safetensors: cannot be read"):
        weights_of(tmp_path / "damaged.safetensors")
    write_published_file(tmp_path / "averaged.safetensors", to_published(random_model()), {"weights": "ema"})
    with pytest.raises(
        ConfigError, match=r"averaged.safetensors holds the averaged weights only; legal: train.init_ema"
    ):
        weights_of(tmp_path / "averaged.safetensors", init_ema=False)
    torch.save({"ema": to_published(random_model())}, tmp_path / "averaged.pt")
    with pytest.raises(CheckpointError, match=r"averaged.pt: holds no 'model'"):
        weights_of(tmp_path / "averaged.pt", init_ema=False)


def test_ranks_with_other_weights_or_a_problem_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    write_published_file(tmp_path / "a.safetensors", to_published(random_model()), {})
    config = TrainConfig(init_from=str(tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match="holds other weights on rank 1 than on rank 0; legal: the same on all hosts"):
        read_initial_weights(config, one_rank(others=[["", False, "other"]]))
    with pytest.raises(ConfigError, match=r"train.init_from: b: no such file or folder"):
        read_initial_weights(config, one_rank(others=[["b: no such file or folder", True, ""]]))
    assert read_initial_weights(TrainConfig(), one_rank()) is None


def test_a_resume_says_that_initial_weights_have_no_effect() -> None:
    changes = ["train.init_from: None -> 'a.pt'", "ema.sigma_rel: [] -> [0.1]"]
    text = describe_resume(changes, Resumed(64, 64, 8), Config(), Clock(32, 4))
    first, second = text.splitlines()[1:]
    assert "(no effect: only a new run reads train.init_from, and this one continues from its checkpoint)" in first
    assert "an average that the checkpoint does not hold starts at the checkpoint's weights" in second


def test_patterns_freeze_the_parameters_that_they_fit() -> None:
    model = random_model()
    freeze(model, ["blocks.*", "?_embedder.*", "*.linear.bias"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rest = {f"final_layer.{name}" for name in ("linear.weight", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")}
    assert trained == rest | {name for name, _ in model.named_parameters() if name.startswith("routers.")}


def test_a_pattern_that_fits_nothing_and_all_patterns_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train.freeze: 'experts.*' fits no parameter; legal: .*routers\.\*\.experts\.w"
    ):
        freeze(random_model(), ["experts.*"])
    with pytest.raises(
        ConfigError, match=r"train.freeze: \['\*'\] leaves no parameter to train; legal: fewer patterns"
    ):
        freeze(random_model(), ["*"])


@pytest.mark.parametrize("variant", ["dit", "switch"])
def test_a_published_flow_model_starts_a_run(variant: str, tmp_path: Path) -> None:
    """The first prediction is the published network's, in the time and with the sign of sdit."""
    numbers = np.load(DATA / "recipe_lightning.npz")
    weights = {
        name.removeprefix("w."): torch.from_numpy(numbers[name]) for name in numbers.files if name.startswith("w.")
    }
    save_file(weights, tmp_path / "lightningdit.safetensors")
    keys = TrainConfig(init_from=str(tmp_path / "lightningdit.safetensors"), init_code="lightningdit")
    initial = read_initial_weights(keys, one_rank())
    assert initial is not None
    shape = json.loads(str(numbers["meta"])) | FLOW_MODEL | {"variant": variant}
    model = build_model(shape, seed=2).eval()
    initial.copy_into(model)
    x, t, y = (torch.from_numpy(numbers[f"in.{name}"]) for name in ("x", "t_flow", "y"))
    assert relative(model(x, t, y).prediction, numbers["out.published_flow"]) < 1e-4


def test_init_code_knows_each_code_base() -> None:
    legal = get_args(get_args(TrainConfig.model_fields["init_code"].annotation)[0])
    assert set(legal) == set(DATA_AT_ONE)
