"""Weights that other people published: names, harmless objects beside the weights, code, paths (R12)."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import os
import pathlib
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdit.checkpoint.load import load_trained
from sdit.config import dump_config
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import load_published, read_published_file, to_published
from sdit.model import build_model
from tests.unit.written_run import random_model, tiny_config, write_run

CONFIG = tiny_config()


def weights(seed: int = 1) -> dict[str, Tensor]:
    return to_published(random_model(CONFIG, seed))


def is_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_every_block(name: str) -> str:
    """The name in a model whose blocks were compiled one by one."""
    first, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    return f"blocks.{number}._orig_mod.{rest}" if first == "blocks" else name


NAMES: dict[str, Callable[[str], str]] = {
    prefix: (lambda name, prefix=prefix: prefix + name)  # type: ignore[misc]
    for prefix in (
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model._orig_mod.",
        "_orig_mod.model.",
        "ema.",
        "ema_model.module.",
        "model.diffusion_model.",
        "_fsdp_wrapped_module.",
    )
} | {"every block": in_every_block}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", NAMES)
def test_wrappers_in_names_are_left_out(tmp_path: Path, kind: str, suffix: str) -> None:
    """R12: Names that torch.compile, DDP, FSDP or an owner put a prefix on are read."""
    expected = weights()
    wrapped = {NAMES[kind](name): value for name, value in expected.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(wrapped, path)
    else:
        torch.save({"model": wrapped, "ema": wrapped, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    (tmp_path / "run.yaml").write_text(dump_config(CONFIG))
    trained = load_trained(path, "ema", tmp_path / "run.yaml")
    assert is_equal(to_published(trained.model), expected)
    model = build_model(CONFIG.model)
    load_published(model, wrapped)
    assert is_equal(to_published(model), expected)


def prefixed(prefix: str, mapping: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in mapping.items()}


LAYOUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "DiT": lambda model, ema: {"model": model, "ema": ema, "opt": {"state": {}, "param_groups": []}},
    "Lightning": lambda model, ema: {"state_dict": prefixed("model.", model) | prefixed("ema.", ema), "epoch": 3},
    "Lightning, compiled": lambda model, ema: {
        "state_dict": prefixed("model._orig_mod.", model) | prefixed("ema_model.module.", ema),
    },
    "other modules": lambda model, ema: {
        "state_dict": prefixed("model.", model)
        | prefixed("model_ema.", ema)
        | {"first_stage_model.conv.weight": torch.zeros(2), "logvar": torch.zeros(3)}
    },
    "state dicts": lambda model, ema: {"model_state_dict": model, "ema_state_dict": ema, "step": 7},
    "nested": lambda model, ema: {"model": {"state_dict": model}, "ema": {"module": ema, "decay": 0.999}},
    "values": lambda model, ema: {"model": model, "ema": {**ema, "num_updates": 12}, "loss": torch.tensor(1.0)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_kinds_of_weights_are_found(tmp_path: Path, layout: str) -> None:
    """R12: Averaged and last weights are told apart wherever training code keeps them."""
    model, ema = weights(1), weights(2)
    torch.save(LAYOUTS[layout](model, ema), tmp_path / "last.pt")
    assert is_equal(read_published_file(tmp_path / "last.pt", "ema"), ema)
    assert is_equal(read_published_file(tmp_path / "last.pt", "model"), model)


def test_two_models_in_one_file_are_refused(tmp_path: Path) -> None:
    """R12: No one of two models is chosen in silence."""
    torch.save(prefixed("net.", weights(1)) | prefixed("model.", weights(2)), tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"two\.pt: net\.(\S+) and model\.\1 are both \1"):
        read_published_file(tmp_path / "two.pt")


class Colour(enum.Enum):
    RED = 1


class AttributeDict(dict[str, Any]):
    """As Lightning keeps hyperparameters."""


def foreign_class() -> Any:
    """An object of a module that the reader cannot import."""
    module = types.ModuleType("somebody_elses_code")
    exec("class Options:\n    def __init__(self): self.lr = 1", vars(module))
    sys.modules["somebody_elses_code"] = module
    return module.Options()


OBJECTS: dict[str, Callable[[], Any]] = {
    "path": lambda: argparse.Namespace(results_dir=pathlib.Path("/data/results"), lr=1e-4),
    "pure path": lambda: {"data": pathlib.PureWindowsPath("C:/x")},
    "nested namespace": lambda: argparse.Namespace(data=argparse.Namespace(path=Path("x"))),
    "simple namespace": lambda: types.SimpleNamespace(path=Path("x")),
    "numpy scalar": lambda: {"loss": np.float64(0.5), "step": np.int64(3)},
    "numpy array": lambda: {"losses": np.arange(3.0)},
    "time": lambda: datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "enum": lambda: Colour.RED,
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "deque": lambda: collections.deque([1, 2]),
    "dict class": lambda: AttributeDict(lr=1.0, path=Path("x")),
    "foreign": foreign_class,
    "path as key": lambda: {Path("x"): 1},
    "generator": lambda: torch.Generator().get_state(),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", OBJECTS)
def test_harmless_objects_do_not_hinder(tmp_path: Path, kind: str, protocol: int) -> None:
    """R12: Objects beside the weights are passed over without importing their classes."""
    content = {"model": weights(1), "ema": weights(2), "args": OBJECTS[kind]()}
    torch.save(content, tmp_path / "0400000.pt", pickle_protocol=protocol)
    sys.modules.pop("somebody_elses_code", None)
    assert is_equal(read_published_file(tmp_path / "0400000.pt"), weights(2))
    assert is_equal(read_published_file(tmp_path / "0400000.pt", "model"), weights(1))
    assert "somebody_elses_code" not in sys.modules


def test_harmless_objects_in_files_of_old_torch(tmp_path: Path) -> None:
    """R12: The format before torch 1.6 is read alike."""
    content = {"ema": weights(2), "args": argparse.Namespace(path=Path("x"))}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert is_equal(read_published_file(tmp_path / "old.pt"), weights(2))


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments

    def __call__(self) -> None:
        """A pickler wants something callable."""


EVIL: dict[str, Callable[[str], Any]] = {
    "os.mkdir": lambda trace: Call(os.mkdir, trace),
    "os.system": lambda trace: Call(os.system, f"mkdir {trace}"),
    "subprocess": lambda trace: Call(subprocess.check_call, ["mkdir", trace]),
    "eval": lambda trace: Call(eval, f"__import__('os').mkdir({trace!r})"),
    "exec": lambda trace: Call(exec, f"import os; os.mkdir({trace!r})"),
    "method": lambda trace: Call(Call(getattr, pathlib.Path, "mkdir"), pathlib.Path(trace)),
    "attribute": lambda trace: Call(Call(getattr, Call(__import__, "os"), "mkdir"), trace),
    "numpy": lambda trace: Call(np.save, trace, 1),
    "torch": lambda trace: Call(torch.save, 1, trace),
    "this project": lambda trace: Call(write_run, Path(trace), 1),
    "open": lambda trace: Call(open, trace, "w"),
}
HIDDEN: dict[str, Callable[[Any], Any]] = {
    "value": lambda evil: {"ema": weights(), "extra": evil},
    "args": lambda evil: {"ema": weights(), "args": argparse.Namespace(path=Path("x"), extra=[{"a": (evil,)}])},
    "tensor": lambda evil: {"ema": {**weights(), "x": evil}},
}


@pytest.mark.parametrize("form", ["zip", "zip of protocol 4", "old", "pickle"])
@pytest.mark.parametrize("place", HIDDEN)
@pytest.mark.parametrize("kind", EVIL)
def test_no_code_of_a_file_is_run(tmp_path: Path, kind: str, place: str, form: str) -> None:
    """R12: A malicious file leaves no trace, beside harmless objects as well."""
    trace, path = tmp_path / "was-run", tmp_path / "evil.pt"
    content = HIDDEN[place](EVIL[kind](str(trace)))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(
            content, path, pickle_protocol=4 if form.endswith("4") else 2, _use_new_zipfile_serialization=form != "old"
        )
    is_refused = False
    try:
        read_published_file(path)
    except CheckpointError as error:
        is_refused = "\n" not in str(error) and str(path) in str(error)
    assert not trace.exists() and not list(tmp_path.glob("was-run*"))
    assert is_refused or kind in ("numpy", "torch", "method", "this project")  # those are only passed over


def test_programs_and_other_archives_are_refused(tmp_path: Path) -> None:
    """R12: TorchScript is not run, a tar is not unpacked."""
    import tarfile

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.add(__file__, "storages")
    for name in ("program.pt", "tar.pt"):
        with pytest.raises(CheckpointError, match=name) as caught:
            read_published_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_messages_about_paths_are_true(tmp_path: Path) -> None:
    """R12: `--config` beside a missing file does not claim that the file has a config."""
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(CONFIG))
    (tmp_path / "empty").mkdir()
    for name in ("none", "none.pt", "none.ckpt", "runs.bin"):
        with pytest.raises(CheckpointError, match=rf"{name}: no such file"):
            load_trained(tmp_path / name, "ema", config)
    with pytest.raises(CheckpointError, match="empty: holds no checkpoint"):
        load_trained(tmp_path / "empty", "ema", config)
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown file type '\.onnx'; legal: \.safetensors, \.pt, \.pth"):
        load_trained(tmp_path / "weights.onnx", "ema", config)
    write_run(tmp_path / "run.pt", CONFIG)  # a folder may have any name
    assert load_trained(tmp_path / "run.pt").clock.images_seen == 28
    with pytest.raises(ConfigError, match=r"run\.pt already has a config"):
        load_trained(tmp_path / "run.pt", "ema", config)
