"""Latents back to pixels, with a VAE from a local folder. n images, C latent channels, H x W latent cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdit.data.encoders import latent_encoder
from sdit.errors import ConfigError

CHUNK = 16  # latents a call; activations at full size are many


class LatentDecoder:
    """The decoder of a diffusers AutoencoderKL; `digest` is the sha256 of its weights."""

    def __init__(self, folder: Path, channels: int, latent_scale: float, device: torch.device | str) -> None:
        facts = latent_encoder(folder, mirrored=False, dtype="float32", batch=CHUNK, device=str(device))
        if facts.channels != channels:
            raise ConfigError(f"--vae: {folder} has {facts.channels} latent channels, the model {channels}")
        from diffusers import AutoencoderKL  # type: ignore[import-not-found,unused-ignore]

        self.digest: str = facts.recipe["vae"]
        self.picture_channels, self.upsampling = facts.picture_channels, facts.downsampling
        self._scale = latent_scale
        self._vae: Any = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._vae.to(device).eval()

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images (n, 3, fH, fW) in about [-1, 1] of scaled latents (n, C, H, W)."""
        return torch.cat([self._vae.decode(part / self._scale).sample for part in latents.split(CHUNK)])
