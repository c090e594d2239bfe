"""Small models whose every parameter is non-zero, so that no term of the forward pass hides behind adaLN-Zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdit.model import DiffusionTransformer, build_model

MakeModel = Callable[..., DiffusionTransformer]
SMALL = {"depth": 2, "width": 16, "heads": 2, "input_size": 4, "channels": 3, "classes": 5, "timesteps": 50}


@pytest.fixture
def make_model() -> MakeModel:
    """Build a small model from overrides of its config, with random parameters."""

    def make(**overrides: Any) -> DiffusionTransformer:
        model = build_model(SMALL | overrides)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        return model

    return make


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (6, 3, 4, 4), tasks with a repeated one, labels with the null label."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, 4, 4, generator=generator)
    return x, torch.tensor([0, 7, 7, 21, 40, 49]), torch.tensor([0, 1, 2, 3, 4, 5])
