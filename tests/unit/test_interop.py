"""Published weights come in and go out unchanged, and nothing in a file is run."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sdit.errors import CheckpointError, ConfigError
from sdit.interop import load_published, read_published_file, to_published, write_published_file
from sdit.model import DiffusionTransformer, build_experts, build_model

SMALL = {"depth": 2, "width": 16, "heads": 2, "input_size": 4, "channels": 3, "classes": 5, "timesteps": 50}
VARIANTS = pytest.mark.parametrize("variant", ["dit", "dtr", "switch"])


def _model(seed: int = 1, **overrides: Any) -> DiffusionTransformer:
    model = build_model(SMALL | overrides)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@VARIANTS
def test_published_names_round_trip(variant: str) -> None:
    published = to_published(_model(variant=variant))
    other = _model(seed=2, variant=variant)
    load_published(other, published)
    assert _equal(to_published(other), published)


def test_published_buffers_are_named() -> None:
    buffers = {
        name: set(to_published(_model(variant=name))) - set(dict(_model(variant=name).named_parameters()))
        for name in ("dit", "dtr", "switch")
    }
    assert buffers["dit"] == {"pos_embed"}
    assert buffers["dtr"] == {"pos_embed", "routers.0._unit_mapping", "routers.1._unit_mapping"}
    assert buffers["switch"] == {"pos_embed", "full_time", "prior._unit_mapping"}


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_prefix_is_accepted(variant: str, dtype: torch.dtype) -> None:
    halved = {f"module.{name}": tensor.to(dtype) for name, tensor in to_published(_model(variant=variant)).items()}
    model = _model(seed=2, variant=variant)
    load_published(model, halved)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, halved[f"module.{name}"].float())


def test_fixed_buffers_may_be_absent() -> None:
    source = _model()
    model = _model(seed=2)
    load_published(model, dict(source.named_parameters()))
    assert _equal(to_published(model), to_published(source))


def test_part_of_the_experts_takes_its_rows() -> None:
    published = to_published(_model())
    part = _model(seed=2)
    for layer in part.layers:
        assert layer.router is not None
        layer.router.experts = build_experts(part.config.experts, part.config.width, [2, 0])
    load_published(part, published)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, published[name][[2, 0]] if ".experts." in name else published[name])


def _broken(change: str) -> dict[str, Tensor]:
    published = to_published(_model())
    if change == "missing":
        del published["blocks.1.attn.qkv.bias"]
    elif change == "unexpected":
        published["blocks.2.attn.qkv.bias"] = torch.zeros(48)
    elif change == "shape":
        published["final_layer.linear.weight"] = torch.zeros(12, 16)
    elif change == "positions":
        published["pos_embed"] = published["pos_embed"] + 2e-5
    elif change == "top_k":
        published["prior._unit_mapping"] = to_published(_model(experts={"top_k": 1}))["prior._unit_mapping"]
    return published


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"does not contain blocks\.1\.attn\.qkv\.bias"),
        ("unexpected", r"also has blocks\.2\.attn\.qkv\.bias"),
        ("shape", r"final_layer\.linear\.weight has shape \(12, 16\), not \(24, 16\)"),
        ("positions", r"pos_embed"),
        ("top_k", r"model\.experts\.top_k: 2 .*legal: 1"),
    ],
)
def test_a_misfit_is_named_and_changes_nothing(change: str, message: str) -> None:
    model = _model(seed=2)
    before = to_published(model)
    with pytest.raises(ConfigError, match=message) as caught:
        load_published(model, _broken(change))
    assert "\n" not in str(caught.value) and _equal(to_published(model), before)


def test_dtr_masks_of_another_config_are_refused() -> None:
    published = to_published(_model(variant="dtr", dtr={"alpha": 2.0}))
    with pytest.raises(ConfigError, match=r"model\.dtr: alpha 4\.0"):
        load_published(_model(variant="dtr"), published)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    published = to_published(_model(variant="dtr"))
    path = tmp_path / f"weights{suffix}"
    write_published_file(path, published, {"images_seen": "128"})
    assert _equal(read_published_file(path), published)
    assert _equal(read_published_file(path, weights="model"), published)
    assert os.listdir(tmp_path) == [path.name]
    if suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"images_seen": "128"}


def test_training_checkpoints_hold_both_weights(tmp_path: Path) -> None:
    model, ema = to_published(_model(seed=1)), to_published(_model(seed=2))
    options = argparse.Namespace(model="DiT-S/2", lr=1e-4)
    torch.save({"model": model, "ema": ema, "opt": {"state": {}}, "args": options}, tmp_path / "0400000.pt")
    assert _equal(read_published_file(tmp_path / "0400000.pt"), ema)
    assert _equal(read_published_file(tmp_path / "0400000.pt", weights="model"), model)
    torch.save(ema, tmp_path / "bare.pt", _use_new_zipfile_serialization=False)
    assert _equal(read_published_file(tmp_path / "bare.pt"), ema)
    torch.save({"model": model}, tmp_path / "no-ema.pt")
    with pytest.raises(CheckpointError, match=r"no-ema\.pt: holds no 'ema'; it holds model"):
        read_published_file(tmp_path / "no-ema.pt")


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    trace, path = tmp_path / "was-run", tmp_path / "evil.pt"
    content = {"ema": to_published(_model()), "extra": _Payload(str(trace))}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt") as caught:
        read_published_file(path)
    assert not trace.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"torn{suffix}"
    with pytest.raises(CheckpointError, match=r"torn.*no such file"):
        read_published_file(path)
    write_published_file(path, to_published(_model()), {})
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="torn") as caught:
            read_published_file(path)
        assert "\n" not in str(caught.value)


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save({"ema": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        read_published_file(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"unknown file type '\.bin'"):
        write_published_file(tmp_path / "weights.bin", {}, {})
