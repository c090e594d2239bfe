"""Files of sampled images: a PNG grid, an npz for evaluation code, raw floats, an npz of latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdit.data.latent_stats import LatentScaling
from sdit.data.pixels import to_pixels
from sdit.errors import ConfigError
from sdit.files import commit
from sdit.observe.sample_grids import save_grid, save_latents

MAX_GRID_IMAGES = 400


class ImageFiles:
    """Collects images in order and writes complete files. A context manager. After an error no file is created."""

    def __init__(
        self, grid: Path | None, npz: Path | None, raw: Path | None, labels: np.ndarray, columns: int,
        facts: Mapping[str, object], latents: Path | None = None, scaling: LatentScaling | None = None,
    ) -> None:  # fmt: skip
        self._grid, self._npz, self._raw, self._latents = grid, npz, raw, latents
        self._scaling = scaling or LatentScaling(1.0)
        self._paths = [path for path in (grid, npz, raw, latents) if path is not None]
        self._kept: list[np.ndarray] = []
        self._labels, self._columns, self._facts = labels, columns, facts
        self._shown: list[np.ndarray] = []
        self._pixels: np.ndarray | None = None
        self._floats: np.ndarray | None = None
        self._count = 0
        for path in self._paths:  # fail before hours of sampling, not after
            path.parent.mkdir(parents=True, exist_ok=True)
            _partial(path).touch()

    def add(self, images: np.ndarray) -> None:
        """Add the next images (n, C, H, W) float32.

        Raises: ConfigError: if an npz is wanted and the images are latents.
        """
        end = self._count + len(images)
        if self._grid is not None and self._count < MAX_GRID_IMAGES:
            self._shown.append(images[: MAX_GRID_IMAGES - self._count])
        if self._npz is not None:
            if images.shape[1] not in (1, 3):
                raise ConfigError(
                    f"--npz: {images.shape[1]} channels are latents, not pixels; legal: --raw, decoded with the VAE"
                )
            if self._pixels is None:
                self._pixels = np.empty((len(self._labels), *images.shape[2:], images.shape[1]), dtype=np.uint8)
            self._pixels[self._count : end] = to_pixels(images)
        if self._latents is not None:
            self._kept.append(images)
        if self._raw is not None:
            if self._floats is None:
                shape = (len(self._labels), *images.shape[1:])
                self._floats = np.lib.format.open_memmap(_partial(self._raw), "w+", np.dtype(np.float32), shape)
            self._floats[self._count : end] = images
        self._count = end

    def __enter__(self) -> ImageFiles:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                assert self._count == len(self._labels), (self._count, len(self._labels))
                self._finish()
        finally:
            for path in self._paths:
                _partial(path).unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._grid is not None:
            save_grid(_partial(self._grid), np.concatenate(self._shown), self._columns, self._facts)
            commit(_partial(self._grid), self._grid)
        if self._npz is not None and self._pixels is not None:
            with _partial(self._npz).open("wb") as file:
                np.savez(file, arr_0=self._pixels, arr_1=self._labels)
            commit(_partial(self._npz), self._npz)
        if self._latents is not None:
            save_latents(self._latents, np.concatenate(self._kept), self._labels, self._scaling)
        if self._raw is not None and isinstance(self._floats, np.memmap):
            self._floats.flush()
            commit(_partial(self._raw), self._raw)


def _partial(path: Path) -> Path:
    """Return the hidden name of a file while it is written. The suffix is kept because it selects the format."""
    return path.with_name(f".partial-{path.name}")
