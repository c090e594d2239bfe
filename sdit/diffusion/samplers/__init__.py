"""Samplers that turn noise into images, for the diffusion path and the flow path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sdit.diffusion.draws import Indices, draw_step_noise
from sdit.diffusion.samplers.discrete import Predict, ReverseProcess, ddim_step, ddpm_step, dpm_solver_2m, single_steps
from sdit.diffusion.samplers.flow import euler, heun, sde, velocity_of
from sdit.diffusion.samplers.settings import SamplerSettings

__all__ = ["Predict", "SamplerSettings", "sample", "trajectory"]


@torch.no_grad()
def sample(
    predict: Predict,
    noise: Tensor,
    y: Tensor,
    settings: SamplerSettings,
    seed: int = 0,
    indices: Indices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return images x0 (B, C, H, W) from `noise` (B, C, H, W).

    Args:
        predict: (x, t, y) -> (B, C_out, H, W), guidance included where `settings.guides_at(t)`. t is an int timestep, or a
            float in (0, 1] for flow.
        seed: ddpm, sde, and ddim with eta > 0 add noise in each step. It is a function of `seed`, sample index and step.
        indices: sample indices (B,), default 0..B-1.
        progress: called with (steps done, all steps) after each step.
    """
    x = noise
    for done, stepped in enumerate(trajectory(predict, noise, y, settings, seed, indices), start=1):
        x = stepped
        if progress is not None:
            progress(done, settings.steps)
    return x


def trajectory(
    predict: Predict, noise: Tensor, y: Tensor, settings: SamplerSettings, seed: int = 0, indices: Indices | None = None
) -> Iterator[Tensor]:
    """Yield x (B, C, H, W) after each step. The last one is x0. Call it under `torch.no_grad()`."""
    x = noise if noise.dtype == torch.float64 else noise.float()
    keys: Indices = np.arange(len(x)) if indices is None else indices
    assert len(keys) == len(x), f"{len(keys)} indices for {len(x)} images"
    if settings.path == "flow":
        velocity = velocity_of(predict, y, settings)
        if settings.sampler == "sde":
            return sde(velocity, x, settings, partial(draw_step_noise, seed, keys))
        return (euler if settings.sampler == "euler" else heun)(velocity, x, settings)
    process = ReverseProcess(predict, y, settings, seed, keys)
    if settings.sampler == "dpm++2m":
        return dpm_solver_2m(process, x)
    return single_steps(ddpm_step if settings.sampler == "ddpm" else ddim_step, process, x)
