"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from sdit.errors import ConfigError
from sdit.model.dit import DiffusionTransformer


def forward_with_guidance(
    model: DiffusionTransformer,
    x: Tensor,
    t: Tensor | int | float,
    y: Tensor,
    scale: float,
    guided_channels: int | None = None,
) -> Tensor:
    """Return the prediction null + scale (conditional - null), (B, C_out, H, W).

    Args:
        x: images (B, C, H, W).
        t: (B,), or one value for all samples.
        y: labels (B,).
        guided_channels: guidance applies to the first `guided_channels` image channels (None: all). The other channels
            and the variance are the conditional ones.

    Raises: ConfigError: if `guided_channels` is out of range, or the model has no labels and scale is not 1.

    Source: Ho & Salimans, arXiv 2207.12598, with weight scale - 1.
    """
    channels = model.config.channels
    guided = channels if guided_channels is None else guided_channels
    if not 1 <= guided <= channels:
        raise ConfigError(f"sample.guided_channels: {guided} is out of range; legal: 1..{channels} (model.channels)")
    if scale == 1:
        return model(x, t, y).prediction
    if not model.config.classes:
        raise ConfigError(f"sample.guidance: {scale} needs labels; legal with model.classes 0: 1")
    both_t = torch.cat([t, t]) if isinstance(t, Tensor) and t.numel() > 1 else t
    both_y = torch.cat([y, torch.full_like(y, model.null_label)])
    conditional, null = model(torch.cat([x, x]), both_t, both_y).prediction.chunk(2)
    mixed = torch.lerp(null[:, :guided], conditional[:, :guided], scale)
    return torch.cat([mixed, conditional[:, guided:]], dim=1)
