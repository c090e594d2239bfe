"""The Triton kernels of merged experts, without a GPU: their numbers in Triton's interpreter, and their machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdit.model.moe import merged

ROOT = Path(__file__).resolve().parents[2]


def _run(module: str, tmp_path: Path, **variables: str) -> Any:
    pytest.importorskip("triton", reason="pip install sdit[kernels]")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.gpu_like.{module}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_kernels_equal_float64_in_the_interpreter(tmp_path: Path) -> None:
    """Sums of at most 150 tokens, 2 experts and 72 columns in float32: each addition rounds by 6e-8 of the largest sum."""
    for shape, errors in _run("kernels_on_cpu", tmp_path, TRITON_INTERPRET="1").items():
        for result, error in errors.items():
            assert error < (150 + 2 + 72) * 6e-8, (shape, result)


def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    sizes = _run("kernels_for_gpus", tmp_path)
    assert len(sizes) == 8 and min(sizes) > 0


def test_a_gpu_without_triton_computes_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "has_triton", lambda: False)
    z, gates, w, b = torch.randn(2, 4, 8), torch.rand(2, 3), torch.randn(3, 8, 8), torch.randn(3, 8)
    computed: Tensor = merged._by_kernel(merged.mix)(z, gates, w, b)
    assert torch.equal(computed, merged.merged_linear(z, gates, w, b))
