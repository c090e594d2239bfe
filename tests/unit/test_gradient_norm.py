"""The gradient norm and the clipping of an engine, against a loop over the gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdit.distributed.engine import Engine


class _Engine(Engine):
    """An engine with fixed gradients."""

    def __init__(self, gradients: list[Tensor], shares: Tensor | float) -> None:
        self.comm: Any = SimpleNamespace(device=torch.device("cpu"))
        self._backend: Any = SimpleNamespace(gradients=lambda: gradients, norm_shares=lambda: shares)
        self.deepspeed: Any = SimpleNamespace(basic_optimizer=SimpleNamespace(param_groups=[]), step=lambda: None)


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7 * i + 1, i % 3 + 1, generator=generator).to(dtype) for i in range(41)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_has_the_bits_of_a_loop(dtype: torch.dtype) -> None:
    gradients = _gradients(dtype)
    shares = 1 / torch.arange(1, len(gradients) + 1, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for gradient, share in zip(gradients, shares.tolist(), strict=True):
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        total += share * norm * norm
    assert torch.equal(_Engine(gradients, shares).squared_gradient_norm(), total)
    assert _Engine(gradients, 1.0).squared_gradient_norm() > total


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_makes_the_norm_not_finite(value: float) -> None:
    gradients = _gradients(torch.float32)
    gradients[3].view(-1)[0] = value
    assert not _Engine(gradients, 1.0).squared_gradient_norm().isfinite()


def test_a_rank_without_gradients_adds_nothing() -> None:
    assert _Engine([], 1.0).squared_gradient_norm().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_has_the_bits_of_a_loop(dtype: torch.dtype) -> None:
    gradients, expected, scale = _gradients(dtype), _gradients(dtype), 0.3712345678
    for gradient in expected:
        gradient.mul_(scale)
    _Engine(gradients, 1.0).step(scale, {})
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    _Engine(gradients, 1.0).step(1.0, {})
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
