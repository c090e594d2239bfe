"""`parallel.compile: auto` compiles where Triton can build its launchers."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdit.config import ParallelConfig
from sdit.model.moe.kernels import has_triton
from sdit.train.layer_wrapping import compiles_blocks

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with Triton, gcc and Python's headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return monkeypatch


def test_auto_compiles_on_gpus_only(machine: pytest.MonkeyPatch) -> None:
    assert ParallelConfig().compile == "auto"
    assert compiles_blocks("auto", GPU) and not compiles_blocks("auto", CPU)


@pytest.mark.parametrize(
    ("module", "name", "missing"),
    [(importlib.util, "find_spec", None), (shutil, "which", None), (sysconfig, "get_path", "/nowhere")],
)
def test_auto_does_not_compile_without_triton_compiler_or_headers(
    module: object, name: str, missing: str | None, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(module, name, lambda _: missing)
    assert not compiles_blocks("auto", GPU)


@pytest.mark.parametrize("wanted", [True, False])
def test_true_and_false_mean_what_they_say(wanted: bool) -> None:
    assert compiles_blocks(ParallelConfig(compile=wanted).compile, CPU) is wanted
