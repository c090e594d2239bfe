"""The scheduler of diffusers that has the betas and the times of a run's sampler. T timesteps."""

from __future__ import annotations

from typing import Any

from sdit.config import DiffusionConfig, SampleConfig
from sdit.diffusion.schedule import BETA_END, BETA_START

PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
NO_LIMIT = 1e9  # `sample_max_value` bounds the percentile of dynamic clipping; sdit has no such bound


def scheduler_config(
    diffusion: DiffusionConfig, sample: SampleConfig, timesteps: int
) -> tuple[dict[str, Any], list[str]]:
    """Return scheduler_config.json, and how its sampler differs from that of the run, one sentence each."""
    if diffusion.path == "flow":
        return _flow_scheduler(diffusion, sample, timesteps)
    kind, options = SCHEDULERS[sample.sampler]
    config = {"_class_name": kind, "num_train_timesteps": timesteps} | _betas(diffusion, timesteps) | options
    clipping, differences = _clipping(diffusion, kind)
    if kind == "DDIMScheduler" and timesteps % sample.steps:
        steps = f"{sample.steps} steps do not divide {timesteps} timesteps"
        differences = [*differences, f"{steps}, so diffusers visits other timesteps than sdit."]
    return config | {"prediction_type": PREDICTIONS[diffusion.prediction]} | clipping, differences


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}),
    "ddpm": ("DDPMScheduler", {"timestep_spacing": "linspace", "variance_type": "fixed_small"}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
         "final_sigmas_type": "zero", "timestep_spacing": "linspace"},
    ),
}  # fmt: skip


def _betas(diffusion: DiffusionConfig, timesteps: int) -> dict[str, Any]:
    if diffusion.schedule == "cosine":
        return {"beta_schedule": "squaredcos_cap_v2"}
    scale = 1000 / timesteps
    return {"beta_schedule": "linear", "beta_start": scale * BETA_START, "beta_end": scale * BETA_END}


def _clipping(diffusion: DiffusionConfig, kind: str) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of the scheduler that clip x0, and the differences that remain."""
    has_clip = kind != "DPMSolverMultistepScheduler"
    none: dict[str, Any] = {"clip_sample": False} if has_clip else {}
    if diffusion.clip_x0 == "none":
        return none, []
    if diffusion.clip_x0 == "fixed" and has_clip:
        return {"clip_sample": True, "clip_sample_range": diffusion.clip_range}, []
    if diffusion.clip_range != 1:
        missing = f"{kind} has no {diffusion.clip_x0} clipping to a range that is not 1"
        return none, [f"x0 is not clipped, because {missing}."]
    keys = none | {"thresholding": True, "dynamic_thresholding_ratio": diffusion.clip_percentile}
    if diffusion.clip_x0 == "fixed":
        return keys | {"sample_max_value": 1.0}, []
    return keys | {"sample_max_value": NO_LIMIT}, ["The percentile of dynamic clipping is interpolated between values."]


def _flow_scheduler(
    diffusion: DiffusionConfig, sample: SampleConfig, timesteps: int
) -> tuple[dict[str, Any], list[str]]:
    shift = sample.time_shift
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": timesteps, "shift": shift}
    differences = []
    if sample.sampler != "euler":
        differences.append(f"Sampling takes Euler steps. The run used {sample.sampler}.")
    if diffusion.clip_x0 != "none":
        differences.append(f"x0 is not clipped. The run used {diffusion.clip_x0} clipping.")
    return config, differences
