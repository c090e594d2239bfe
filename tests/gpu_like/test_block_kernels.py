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
    """Sums of at most 150 tokens, 2 experts and 72 columns in float32: each addition rounds by 6e-8 of the largest sum.

    In float16, each rounding is at most 2^-11 of a value: of a merged matrix and of a result, or of a sum of tokens, its product
    with the biases, the tiles' sum and the total.
    """
    limits = {"float32": (150 + 2 + 72) * 6e-8, "float16": 4 * 2**-11}
    for dtype, by_shape in _run("kernels_on_cpu", tmp_path, TRITON_INTERPRET="1").items():
        for shape, errors in by_shape.items():
            for result, error in errors.items():
                assert error < limits[dtype], (dtype, shape, result)


def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    sizes = _run("kernels_for_gpus", tmp_path)
    assert len(sizes) == 4 and min(sizes) > 0


@pytest.mark.parametrize(("dtype", "has_triton"), [(torch.bfloat16, False), (torch.float32, True)])
def test_a_gpu_computes_as_a_cpu_does_without_triton_and_in_float32(
    dtype: torch.dtype, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "has_triton", lambda: has_triton)
    z, gates, w, b = (torch.rand(shape, dtype=dtype) for shape in ((2, 4, 8), (2, 3), (3, 8, 8), (3, 8)))
    computed: Tensor = merged._by_kernel(merged.mix)(z, gates, w, b)
    assert torch.equal(computed, merged.merged_linear(z, gates, w, b))
