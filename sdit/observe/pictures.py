"""PNG pictures of a run: sample grids and routing maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdit.config import ModelConfig
from sdit.model import Assignment
from sdit.model.windows import expert_windows
from sdit.observe.routing import routing_map
from sdit.train.clock import Clock
from sdit.train.events import Observer

MIN_TILE_PIXELS = 48  # smaller images are enlarged by a whole factor, so that a person sees them
GAP_PIXELS = 2
GAP_GREY = 96


class Pictures(Observer):
    """Writes RUN/samples/images-N.png and RUN/routing/images-N.png whenever samples were drawn."""

    def __init__(self, run_dir: Path, model: ModelConfig) -> None:
        self._samples, self._routing, self._model = run_dir / "samples", run_dir / "routing", model

    def on_samples(self, clock: Clock, images: np.ndarray, labels: np.ndarray, columns: int) -> None:
        self._samples.mkdir(parents=True, exist_ok=True)
        save_grid(
            self._samples / f"images-{clock.images_seen:012d}.png", images, columns, {"images_seen": clock.images_seen}
        )

    def on_routing(self, clock: Clock, probs: np.ndarray, columns: Sequence[int] | None) -> None:
        self._routing.mkdir(parents=True, exist_ok=True)
        assignment = None
        if columns is not None:
            assignment = Assignment(np.asarray(columns, dtype=np.int64), expert_windows(self._model))
        path = self._routing / f"images-{clock.images_seen:012d}.png"
        routing_map(probs, self._model.experts.top_k, assignment, path, f"after {clock.images_seen:,} images")


def to_pixels(images: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8 of images (n, C, H, W) in [-1, 1]."""
    return np.clip(np.round((images.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255).astype(np.uint8)


def save_grid(path: Path, images: np.ndarray, columns: int, facts: Mapping[str, object] | None = None) -> None:
    """Write images (n, C, H, W) in [-1, 1] as one PNG of `columns` columns, with `facts` in its text chunks.

    Of more than 3 channels the first three are shown, of two the first.
    """
    save_pixels(path, to_pixels(images[:, :3] if images.shape[1] >= 3 else images[:, :1]), columns, facts)


def save_pixels(path: Path, pixels: np.ndarray, columns: int, facts: Mapping[str, object] | None = None) -> None:
    """The same for pixels (n, H, W, 1 or 3) uint8."""
    n, height, width, channels = pixels.shape
    factor = -(-MIN_TILE_PIXELS // max(height, width))
    tiles = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, step_y, step_x = -(-n // columns), height * factor + GAP_PIXELS, width * factor + GAP_PIXELS
    grid = np.full((rows * step_y + GAP_PIXELS, columns * step_x + GAP_PIXELS, channels), GAP_GREY, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * step_y + GAP_PIXELS, number % columns * step_x + GAP_PIXELS
        grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    text = PngInfo()
    for key, value in (facts or {}).items():
        text.add_text(key, str(value))
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, pnginfo=text)
