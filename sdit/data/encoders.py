"""Encoders from images to stored samples: PNG, or the posterior moments of a variational autoencoder (VAE).

B images, C channels of the latent, H = W size of the latent, O orientations.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdit.checked_files import open_regular, read_regular
from sdit.data.decode import encode_moments, encode_png
from sdit.data.index import DatasetFacts
from sdit.data.shards import Encoded
from sdit.data.sources import SourceImage
from sdit.errors import ConfigError, DataError
from sdit.safetensors_file import read_header

if TYPE_CHECKING:
    import torch


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlainEncoder:
    """An encoder that stores each array without loss, as the member that ends in `suffix`. It can be pickled.

    `recipe` holds the settings that determine the stored bytes, as JSON.
    """

    recipe: dict[str, Any]
    suffix: str
    to_bytes: Callable[[np.ndarray], bytes]

    def facts(self, images: DatasetFacts) -> DatasetFacts:
        """Return the facts of the stored samples, given the facts of the images."""
        return images

    def encode(self, images: Iterable[SourceImage]) -> Iterator[tuple[str, Encoded]]:
        """Yield the key and the members of each image, in order."""
        for image in images:
            yield image.key, {self.suffix: self.to_bytes(_pixels(image)), "cls": _label(image)}


def png_encoder() -> PlainEncoder:
    """Return the encoder for image shards."""
    return PlainEncoder({"stored": "png"}, "png", encode_png)


def moments_encoder() -> PlainEncoder:
    """Return the encoder for images that are moments already."""
    return PlainEncoder({"stored": "moments"}, "npy", encode_moments)


@dataclass(frozen=True)
class LatentEncoder:
    """An encoder that stores mean and log-variance of the VAE's posterior.

    If `mirrored` is True, it stores the moments of the mirrored image too.
    """

    recipe: dict[str, Any]
    vae: Path
    channels: int
    picture_channels: int
    downsampling: int
    latent_scale: float
    mirrored: bool
    dtype: str
    batch: int
    device: str
    shift: float

    def facts(self, images: DatasetFacts) -> DatasetFacts:
        if images.channels != self.picture_channels:
            raise ConfigError(f"--vae: takes {self.picture_channels} channels, the images have {images.channels}")
        if images.size % self.downsampling:
            raise ConfigError(f"--size: {images.size}; legal with this VAE: multiples of {self.downsampling}")
        if self.shift:
            text = "--vae: its shift_factor %g is not applied; data.latent_stats: index centres the latents"
            _log.warning(text, self.shift)
        size = images.size // self.downsampling
        latents = {"kind": "latents", "channels": self.channels, "size": size, "mirrored": self.mirrored}
        return images.model_copy(update={**latents, "latent_scale": self.latent_scale})

    def encode(self, images: Iterable[SourceImage]) -> Iterator[tuple[str, Encoded]]:
        remaining = iter(images)
        while batch := list(islice(remaining, self.batch)):
            moments = self._moments(np.stack([_pixels(image) for image in batch]))
            for image, each in zip(batch, moments, strict=True):
                if not np.isfinite(each).all():
                    raise DataError(f"image {image.key}: the VAE's moments are not finite")
                yield image.key, {"npy": encode_moments(each), "cls": _label(image)}

    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        """Return posterior moments (B, O, 2C, H, W) of pixels (B, 3, fH, fW) uint8, f the VAE's downsampling."""
        import torch

        # With one thread in each process, the bytes do not depend on the number of processes.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                images = torch.from_numpy(pixels).to(self.device, torch.float32) / 127.5 - 1
                orientations = [images, images.flip(-1)] if self.mirrored else [images]
                moments = torch.stack([_posterior(self.vae, self.device, each) for each in orientations], dim=1)
        finally:
            torch.set_num_threads(threads)
        return moments.cpu().numpy().astype(self.dtype)


Encoder = PlainEncoder | LatentEncoder


def latent_encoder(vae: Path, mirrored: bool, dtype: str, batch: int, device: str) -> LatentEncoder:
    """Return the encoder that uses the diffusers AutoencoderKL in a local folder.

    Raises: ConfigError: if the folder has no such autoencoder or diffusers is not installed.
    """
    try:
        config = json.loads(read_regular(vae / "config.json"))
        with open_regular(vae / "diffusion_pytorch_model.safetensors") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"--vae: {error.filename}: {error.strerror}; legal: a local folder with config.json and "
            "diffusion_pytorch_model.safetensors"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--vae: {vae / 'config.json'} is not JSON: {error}") from None
    if config.get("_class_name") != "AutoencoderKL":
        raise ConfigError(f"--vae: {vae} is a {config.get('_class_name')}; legal: an AutoencoderKL")
    read_header(vae / "diffusion_pytorch_model.safetensors")
    _autoencoder_class()
    recipe = {"stored": "moments", "vae": weights, "mirrored": mirrored, "dtype": dtype, "batch": batch}
    try:
        return LatentEncoder(
            recipe, vae, channels=config["latent_channels"], picture_channels=config["in_channels"],
            downsampling=2 ** (len(config["block_out_channels"]) - 1), latent_scale=config["scaling_factor"],
            mirrored=mirrored, dtype=dtype, batch=batch, device=device, shift=config.get("shift_factor") or 0.0,
        )  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"--vae: {vae / 'config.json'} has no {error}") from None


def _posterior(vae: Path, device: str, images: torch.Tensor) -> torch.Tensor:
    """Return mean and log-variance (B, 2C, H, W) of images (B, 3, fH, fW) in [-1, 1]."""
    import torch

    posterior = load_autoencoder(vae, device).encode(images).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


@lru_cache(maxsize=1)
def load_autoencoder(vae: Path, device: str) -> Any:
    """Return the AutoencoderKL of a local folder, in evaluation mode on `device`.

    Raises: ConfigError: if it cannot be loaded or weights are missing.
    """
    try:
        # low_cpu_mem_usage needs another package and logs a warning at each start.
        model, found = _autoencoder_class().from_pretrained(
            vae, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # any error of diffusers is caused by the folder
        raise ConfigError(f"--vae: {vae}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    if found["missing_keys"]:  # diffusers would initialise them at random
        raise ConfigError(f"--vae: {vae}: its weights do not contain {', '.join(sorted(found['missing_keys'])[:3])}")
    return model.to(device).eval()


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKL  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError("latents need diffusers; run: pip install sdit[vae]") from None
    return AutoencoderKL


def _pixels(image: SourceImage) -> np.ndarray:
    assert isinstance(image.pixels, np.ndarray)  # `prepare` removed the images without pixels
    return image.pixels


def _label(image: SourceImage) -> bytes:
    return str(image.label).encode()
