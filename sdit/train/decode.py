"""Latents back to pixels, with a VAE from a local folder. n images, C latent channels, H x W latent cells."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from sdit.config import Config
from sdit.data.dataset import data_kind, data_recipe, latent_stats_of
from sdit.data.encoders import latent_encoder, load_autoencoder
from sdit.data.identity import DataIdentity
from sdit.data.latent_stats import LatentScaling
from sdit.errors import ConfigError

CHUNK = 16  # latents a call; activations at full size are many
_log = logging.getLogger(__name__)


def draws_latents(config: Config, data: DataIdentity | None = None) -> bool:
    """Return True if a model draws latents: by its channels, or by its training `data`, or by those of its config."""
    kind = data_kind(config.data) if data is None else data.kind
    return config.model.channels not in (1, 3) or kind == "latents"


def latent_scaling(config: Config, data: DataIdentity | None) -> LatentScaling:
    """Return how the latents of a run are normalised: as its checkpoint says, or, if its data are unknown, its config.

    Raises: ConfigError: if the config names statistics that cannot be read.
    """
    statistics = latent_stats_of(config.data) if data is None else data.latent_stats
    return LatentScaling(config.data.latent_scale, statistics)


def latent_decoder(
    config: Config, data: DataIdentity | None, vae: Path | None, device: torch.device | str
) -> LatentDecoder | None:
    """Return the decoder in the folder `vae`, or in that of the config; None if neither is given.

    `data` are the training data of the model, None if they are unknown.

    Raises: ConfigError for a model that draws pixels, and for a folder that does not fit.
    """
    folder = vae or (Path(config.sample.vae) if config.sample.vae else None)
    if folder is None:
        return None
    try:
        if not draws_latents(config, data) and (data_kind(config.data) if data is None else data.kind) == "images":
            raise ConfigError(
                f"--vae: {folder}, but the model was trained on images; legal: only for a model of latents"
            )
        scaling = latent_scaling(config, data)
        if scaling.statistics is not None:
            where = config.data.latent_stats or "the checkpoint"
            scaling.statistics.check_fit(config.model.channels, config.model.input_size, where)
        decoder = LatentDecoder(folder, config.model.channels, scaling, device)
    except ConfigError as error:
        raise ConfigError(str(error) if vae else str(error).replace("--vae", "sample.vae")) from None
    encoder = data_recipe(config.data).get("vae", decoder.digest)
    if encoder != decoder.digest:
        _log.warning("--vae: %s is not the VAE that encoded %s; images may differ", folder, config.data.path)
    return decoder


def restored_latents(latents: Tensor, scaling: LatentScaling) -> Tensor:
    """Return the latents of the VAE of normalised latents z' (n, C, H, W): z' * std / multiplier + mean."""
    if scaling.statistics is None:
        return latents / scaling.multiplier
    mean, std = (torch.from_numpy(each).to(latents.device) for each in scaling.statistics.arrays)
    return latents * (std / scaling.multiplier) + mean


class LatentDecoder:
    """The decoder of a diffusers AutoencoderKL; `digest` is the sha256 of its weights."""

    def __init__(self, folder: Path, channels: int, scaling: LatentScaling, device: torch.device | str) -> None:
        facts = latent_encoder(folder, mirrored=False, dtype="float32", batch=CHUNK, device=str(device))
        if facts.channels != channels:
            raise ConfigError(f"--vae: {folder} has {facts.channels} latent channels, the model {channels}")
        self.digest: str = facts.recipe["vae"]
        self.picture_channels, self.upsampling = facts.picture_channels, facts.downsampling
        self.scaling = scaling
        self._vae = load_autoencoder(folder, str(device))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Return images (n, 3, fH, fW) in about [-1, 1] of normalised latents (n, C, H, W)."""
        return torch.cat(
            [self._vae.decode(restored_latents(part, self.scaling)).sample for part in latents.split(CHUNK)]
        )
