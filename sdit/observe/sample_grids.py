"""Writes the sample grids of a run as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdit.clock import Clock
from sdit.config import Config
from sdit.data.classes import Classes
from sdit.data.dataset import data_classes, latent_stats_of
from sdit.data.latent_stats import LatentScaling
from sdit.data.pixels import to_pixels
from sdit.files import replacing
from sdit.supervise.run_folder import RunFolder, anchored
from sdit.train.events import SAMPLES, Observer, OnFailure

MIN_TILE_PIXELS = 48  # smaller images are enlarged by a whole factor so that they are visible
GAP_PIXELS = 2
GAP_GREY = 96


class SampleGrids(Observer):
    """Writes RUN/samples/images-N.png after each sampling. Latents are written to latents-N.npz instead."""

    name, on_failure = "sample grids", OnFailure.RETRY

    def __init__(
        self, run_dir: Path | RunFolder, scaling: LatentScaling | None = None, classes: Classes | None = None
    ) -> None:
        """Take how latents are normalised, None for a run on images, and the classes that name the rows of a grid."""
        self._run_dir, self._scaling, self._classes = run_dir, scaling, classes

    @classmethod
    def of(cls, config: Config, run_dir: Path | RunFolder, shows_images: bool) -> SampleGrids:
        """Return the observer of a run. `shows_images` False: the run samples latents that nothing decodes."""
        scaling = None if shows_images else LatentScaling(config.data.latent_scale, latent_stats_of(config.data))
        return cls(run_dir, scaling, data_classes(config.data) if config.model.classes else None)

    @property
    def _folder(self) -> Path:
        return self._run_dir / "samples"

    def on_start(self, clock: Clock, total_images: int, message: str) -> None:
        self.on_rollback(clock, message)

    def on_rollback(self, clock: Clock, text: str) -> None:
        remove_after(self._folder, clock.images_seen)

    def missing(self, clock: Clock) -> set[str]:
        return set() if self._path(clock).exists() else {SAMPLES}

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        (anchored(self._run_dir) / "samples").mkdir(exist_ok=True)
        if self._scaling is None:
            named = "" if self._classes is None else self._classes.describe_all(labels.tolist())
            facts = {"images_seen": clock.images_seen, **({"labels": named} if named else {})}
            save_grid(self._path(clock), images, columns, facts)
        else:
            save_latents(self._path(clock), images, labels, self._scaling)

    def _path(self, clock: Clock) -> Path:
        name = f"images-{clock.images_seen:012d}.png"
        return self._folder / (name if self._scaling is None else latents_name(name))


def remove_after(folder: Path, images_seen: int) -> None:
    """Delete the files images-N.*, latents-N.* and tokens-N.* with N > images_seen, which the resumed run writes again."""
    for path in (path for kind in ("images", "latents", "tokens") for path in folder.glob(f"{kind}-*.*")):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) > images_seen:
            path.unlink(missing_ok=True)


def shown_channels(images: np.ndarray) -> np.ndarray:
    """Return the first three channels of images (n, C, H, W) with C >= 3, else the first channel."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1]


def latents_name(name: str) -> str:
    """Return the name of the latents file that replaces an image file."""
    return Path(name.replace("images-", "latents-")).with_suffix(".npz").name


def save_latents(path: Path, latents: np.ndarray, labels: np.ndarray, scaling: LatentScaling) -> None:
    """Write `latents` (n, C, H, W) float32 as the model samples them, with `labels` (n,) and how to invert `scaling`."""
    with replacing(path) as file:
        np.savez(file, latents=latents, labels=labels, **scaling.arrays)  # type: ignore[arg-type]


def save_grid(path: Path, images: np.ndarray, columns: int, facts: Mapping[str, object] | None = None) -> None:
    """Write images (n, C, H, W) in [-1, 1] as one PNG of `columns` columns, with `facts` in its text chunks.

    If there are more than 3 channels, the first three are shown. If there are two, the first is shown.
    """
    save_pixels(path, to_pixels(shown_channels(images)), columns, facts)


def save_pixels(path: Path, pixels: np.ndarray, columns: int, facts: Mapping[str, object] | None = None) -> None:
    """Write pixels (n, H, W, 1 or 3) uint8 as one image of `columns` columns, with `facts` in its text chunks."""
    text = PngInfo()
    for key, value in (facts or {}).items():
        text.add_text(key, str(value))
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with replacing(path) as file:
        Image.fromarray(grid_pixels(pixels, columns)).save(file, format=kind, pnginfo=text)


def grid_pixels(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Return the grid (height, width) or (height, width, 3) uint8 of pixels (n, H, W, 1 or 3).

    Small images are enlarged by a whole factor.
    """
    n, height, width, channels = pixels.shape
    factor = -(-MIN_TILE_PIXELS // max(height, width))
    tiles = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, step_y, step_x = -(-n // columns), height * factor + GAP_PIXELS, width * factor + GAP_PIXELS
    grid = np.full((rows * step_y + GAP_PIXELS, columns * step_x + GAP_PIXELS, channels), GAP_GREY, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * step_y + GAP_PIXELS, number % columns * step_x + GAP_PIXELS
        grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return grid[..., 0] if channels == 1 else grid
