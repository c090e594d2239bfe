"""A pipeline for models that sdit exported: DiT, DTR and Switch-DiT, on latents or pixels, with any number of classes.

It differs from diffusers' DiTPipeline, which it can replace:
- a plain DiT gets the time frequencies that it was trained with, 10000^(-i/128); diffusers computes 10000^(-i/127);
- the null label is the number of classes, not 1000;
- the times are those of sdit's samplers, and guidance may be limited to some channels and times;
- it accepts the initial noise, a learned variance, and models without a VAE.
This file needs only torch, numpy and diffusers. B samples, C channels, T timesteps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (  # type: ignore[import-not-found,unused-ignore]
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.utils.torch_utils import randn_tensor  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

ROUNDING = 1e-6  # schedulers store flow times in float32


def use_trained_frequencies(transformer: Any) -> None:
    """Set the time frequencies of a DiTTransformer2DModel to those of DiT. Other transformers have them already."""
    for block in getattr(transformer, "transformer_blocks", ()):
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def log_snr_timesteps(alpha_bar: np.ndarray, steps: int) -> list[int]:
    """Return the falling timesteps, evenly spaced in log-SNR and rounded to distinct numbers (DPM-Solver)."""
    total = len(alpha_bar)
    if steps == 1:
        return [total - 1]
    position = np.arange(steps)
    falling = np.log(alpha_bar / (1 - alpha_bar))
    wanted = np.interp(-np.linspace(falling[0], falling[-1], steps), -falling, np.arange(total))
    distinct = np.maximum.accumulate(np.rint(wanted).astype(np.int64) - position) + position
    return np.minimum(distinct, total - steps + position)[::-1].tolist()


class SditPipeline(DiffusionPipeline):
    """Draws images by class. `id2label` maps labels to class names, as in DiTPipeline."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  the base class declares a list

    def __init__(
        self, transformer: Any, scheduler: Any, vae: Any = None, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        use_trained_frequencies(transformer)
        if (
            isinstance(scheduler, DDPMScheduler)
            and transformer.config.out_channels == 2 * transformer.config.in_channels
        ):
            scheduler.register_to_config(variance_type="learned_range")
            scheduler.variance_type = "learned_range"  # `step` reads the attribute, its variance the config
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the labels of class names.

        Raises: ValueError: if a name is unknown.
        """
        names = [label] if isinstance(label, str) else label
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a class; legal: {', '.join(sorted(self.labels)) or 'no names'}")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        guided_channels: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return one image per label: `images`, or a tuple with them without `return_dict`.

        Args:
            class_labels: labels (B,). The number of classes is the null label. Without labels only their number counts.
            guidance_scale: null + scale (conditional - null). 1: none.
            latents: initial noise (B, C, H, W); drawn from `generator` if it is missing.
            guided_channels: guidance applies to the first channels (None: all).
            guidance_interval: times in [0, 1] at which guidance applies, both ends included. 0 is data.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent", what the network draws.
        """
        x, labels = self._start(class_labels, latents, generator)
        self._set_times(num_inference_steps)
        total = self.scheduler.config.num_train_timesteps
        step_options = self._step_options(generator)
        low, high = guidance_interval
        for t in self.progress_bar(self.scheduler.timesteps):
            is_guided = low - ROUNDING <= float(t) / total <= high + ROUNDING
            scale = guidance_scale if is_guided else 1.0
            inputs = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = self._predict(inputs, t, labels, scale, guided_channels)
            x = self.scheduler.step(output, t, x, return_dict=False, **step_options)[0]
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _start(self, class_labels: Sequence[int], latents: Tensor | None, generator: Any) -> tuple[Tensor, Tensor]:
        """Return the initial noise (B, C, H, W) and the labels (B,)."""
        config, device, dtype = self.transformer.config, self._execution_device, self.transformer.dtype
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        classes = config.num_embeds_ada_norm
        if classes and not bool(((labels >= 0) & (labels <= classes)).all()):
            raise ValueError(f"class_labels: {labels.tolist()} are out of range; legal: 0..{classes} ({classes}: null)")
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: shape {tuple(latents.shape)} is not legal; legal: {shape}")
        return latents.to(device, dtype), labels

    def _set_times(self, steps: int) -> None:
        """Set the times of sdit's samplers, where diffusers chooses others for the same scheduler."""
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            even, shift = np.arange(steps, 0, -1) / steps, self.scheduler.config.shift
            times = shift * even / (1 + (shift - 1) * even)
            # diffusers shifts in float32, which moves some times to another task. It takes these times as they are.
            timesteps = times.astype(np.float32) * np.float32(self.scheduler.config.num_train_timesteps)
            self.scheduler.set_timesteps(sigmas=even.tolist(), timesteps=timesteps.tolist())
        elif isinstance(self.scheduler, DPMSolverMultistepScheduler):
            alpha_bar = self.scheduler.alphas_cumprod.double().cpu().numpy()
            self.scheduler.set_timesteps(timesteps=log_snr_timesteps(alpha_bar, steps))
        else:
            self.scheduler.set_timesteps(steps)
            if steps == 1:  # diffusers would visit timestep 0, at which there is no noise
                self.scheduler.timesteps = torch.tensor([self.scheduler.config.num_train_timesteps - 1])

    def _step_options(self, generator: Any) -> dict[str, Any]:
        """Return the options of `scheduler.step`: the noise's generator, and in DDIM the noise that fits a clipped x0."""
        known = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator, "use_clipped_model_output": True}
        return {name: value for name, value in options.items() if name in known}

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float, guided_channels: int | None) -> Tensor:
        """Return the guided prediction, with the variance if the scheduler uses it."""
        config = self.transformer.config
        channels = config.in_channels
        time = t.to(x.device)
        if scale == 1:
            output = self.transformer(x, timestep=time.expand(len(x)), class_labels=labels).sample
        else:
            if not config.num_embeds_ada_norm:
                raise ValueError(f"guidance_scale: {scale} needs labels; legal for this model: 1")
            both = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
            doubled = torch.cat([x, x])
            output = self.transformer(doubled, timestep=time.expand(len(doubled)), class_labels=both).sample
            conditional, null = output.chunk(2)
            guided = channels if guided_channels is None else guided_channels
            mixed = torch.lerp(null[:, :guided], conditional[:, :guided], scale)
            output = torch.cat([mixed, conditional[:, guided:]], dim=1)
        uses_variance = str(getattr(self.scheduler.config, "variance_type", None)).startswith("learned")
        return output if uses_variance else output[:, :channels]

    def _decode(self, x: Tensor, output_type: str) -> Any:
        """Return the images of what was drawn: decoded by the VAE, or x itself if there is none, for pixels in [-1, 1]."""
        if self.vae is not None:
            x = x / self.vae.config.scaling_factor
            mean, std = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
            if mean is not None and std is not None:
                mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype) for values in (mean, std))
                mean, std = (v if v.dim() == 3 else v.view(-1, 1, 1) for v in (mean, std))  # (C,), or one per position
                x = x * std + mean
            x = self.vae.decode(x).sample
        elif x.shape[1] not in (1, 3):
            raise ValueError(f"vae: {x.shape[1]} channels are not pixels; pass a vae, or output_type='latent'")
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        images = x.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
