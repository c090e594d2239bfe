"""Latents back to pixels, with a VAE from a local folder. n images, C latent channels, H x W latent cells."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from sdit.config import Config
from sdit.data.dataset import data_kind, data_recipe
from sdit.data.encoders import latent_encoder, load_autoencoder
from sdit.errors import ConfigError

CHUNK = 16  # latents a call; activations at full size are many
_log = logging.getLogger(__name__)


def draws_latents(config: Config) -> bool:
    """Whether a model draws latents: by its channels, or by its training data, if they are still there."""
    return config.model.channels not in (1, 3) or data_kind(config.data) == "latents"


def latent_decoder(config: Config, vae: Path | None, device: torch.device | str) -> LatentDecoder | None:
    """The decoder in the folder `vae`, or in that of the config; None if neither is given.

    Raises: ConfigError for a model that draws pixels, and for a folder that does not fit.
    """
    folder = vae or (Path(config.sample.vae) if config.sample.vae else None)
    if folder is None:
        return None
    try:
        if not draws_latents(config) and data_kind(config.data) == "images":
            raise ConfigError(
                f"--vae: {folder}, but the model was trained on images; legal: only for a model of latents"
            )
        decoder = LatentDecoder(folder, config.model.channels, config.data.latent_scale, device)
    except ConfigError as error:
        raise ConfigError(str(error) if vae else str(error).replace("--vae", "sample.vae")) from None
    encoder = data_recipe(config.data).get("vae", decoder.digest)
    if encoder != decoder.digest:
        _log.warning("--vae: %s is not the VAE that encoded %s; images may differ", folder, config.data.path)
    return decoder


class LatentDecoder:
    """The decoder of a diffusers AutoencoderKL; `digest` is the sha256 of its weights."""

    def __init__(self, folder: Path, channels: int, latent_scale: float, device: torch.device | str) -> None:
        facts = latent_encoder(folder, mirrored=False, dtype="float32", batch=CHUNK, device=str(device))
        if facts.channels != channels:
            raise ConfigError(f"--vae: {folder} has {facts.channels} latent channels, the model {channels}")
        self.digest: str = facts.recipe["vae"]
        self.picture_channels, self.upsampling = facts.picture_channels, facts.downsampling
        self._scale = latent_scale
        self._vae = load_autoencoder(folder, str(device))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images (n, 3, fH, fW) in about [-1, 1] of scaled latents (n, C, H, W)."""
        return torch.cat([self._vae.decode(part / self._scale).sample for part in latents.split(CHUNK)])
