"""Thousands of sampled images in files, so that an evaluation that was killed continues.

n images, H x W pixels, C channels.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdit.checkpoint.files import MANIFEST
from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.contracts import Progress
from sdit.data.pixels import ROUNDING, to_pixels
from sdit.errors import ConfigError, DataError
from sdit.evaluate.generate import Generator
from sdit.evaluate.images import NpzImages, Shape, write_npz
from sdit.files import replacing
from sdit.train.decode import draws_latents

# Keys of `diffusion` that only training reads, and keys of `sample`, both younger than the names of the oldest caches.
TRAINING_KEYS = {"logit_mean", "logit_std", "time_shift", "direction_weight", "contrastive_weight"}
SAMPLER_KEYS = ("time_shift", "guidance_interval", "diffusion_form", "diffusion_norm", "last_step", "last_step_size")

UNNAMED = ("precision", "fp32")  # that of the oldest caches, whose names do not depend on it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSet:
    """`count` images of a generator: label i modulo the trained classes, noise keyed by (settings.seed, i)."""

    generator: Generator
    weights: str
    count: int

    def __post_init__(self) -> None:
        channels = self.trained.config.model.channels
        if self.generator.decoder is None and draws_latents(self.trained.config, self.trained.data):
            raise ConfigError(f"--vae: is not set, and {channels} channels are latents, not pixels; legal: a folder")

    @property
    def trained(self) -> Trained:
        """The model and its run."""
        return self.generator.trained

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return np.resize(np.array(self.trained.classes.labels or [0], dtype=np.int64), self.count)

    @property
    def shape(self) -> Shape:
        """(H, W, C) of every image."""
        model, decoder = self.trained.config.model, self.generator.decoder
        if decoder is None:
            return (model.input_size, model.input_size, model.channels)
        size = model.input_size * decoder.upsampling
        return (size, size, decoder.picture_channels)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that decides the images except how many there are, as JSON."""
        config, chosen, empty = self.trained.config, self.generator.settings, self.trained.classes.empty
        decoder = self.generator.decoder
        return {
            "checkpoint_sha256": checkpoint_digest(self.trained.origin),
            "weights": self.weights,
            "sampler": chosen.sampler,
            "steps": chosen.steps,
            "guidance": chosen.guidance,
            "guided_channels": chosen.guided_channels,
            **_changed(chosen),
            "seed": chosen.seed,
            "precision": self.trained.precision,
            "classes": self.trained.classes.count,
            **({"empty_classes": list(empty)} if empty else {}),
            "diffusion": config.diffusion.model_dump(mode="json", exclude=TRAINING_KEYS),
            "vae_sha256": None if decoder is None else decoder.digest,
            **({"latent_scale": None} if decoder is None else decoder.scaling.facts),
            "rounding": ROUNDING,
            "device": self.trained.model.device.type,
        }


def _changed(chosen: SampleConfig) -> dict[str, Any]:
    """Return the SAMPLER_KEYS that differ from their defaults, so that a cache of an older version keeps its name."""
    defaults = SampleConfig()
    return {key: value for key in SAMPLER_KEYS if (value := getattr(chosen, key)) != getattr(defaults, key)}


def checkpoint_digest(path: Path) -> str:
    """sha256 of a published file, or of a checkpoint's manifest, which holds the checksums of its files."""
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SampleCache:
    """The images of a sample set in files of `size` images, in a folder named after all that decides them; an ImageSet.

    `other_classes`: how those of the reference differ, for the result.
    """

    def __init__(self, folder: Path, samples: SampleSet, size: int, other_classes: str = "") -> None:
        self._samples, self._size, self._other_classes = samples, size, other_classes
        self.name, self.count, self.shape = str(samples.trained.origin), samples.count, samples.shape
        decisive = {name: value for name, value in samples.facts.items() if (name, value) != UNNAMED}
        key = json.dumps({**decisive, "block": size}, sort_keys=True)
        self.folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._starts = range(0, samples.count, size)

    def fill(self, progress: Progress | None = None) -> None:
        """Sample the missing files on all ranks; rank 0 writes them. `progress` counts images."""
        comm = self._samples.generator.comm
        is_first = comm is None or comm.is_first
        missing = self._missing() if is_first else []
        if comm is not None:
            missing = comm.from_first(missing)
        for start in missing:
            images = self._sample(start, progress if is_first else None)
            if is_first:
                with replacing(self._path(start)) as file:
                    np.savez(file, arr_0=images)
        if progress is not None:
            progress(self._samples.count, self._samples.count)

    def batches(self) -> Iterator[np.ndarray]:
        """All images in order, (n, H, W, C) uint8."""
        for start in self._starts:
            yield from NpzImages(self._path(start)).batches()

    @property
    def facts(self) -> dict[str, Any]:
        """What was sampled, as JSON."""
        trained = self._samples.trained
        origin = {"checkpoint": str(trained.origin), "images_seen": trained.clock.images_seen}
        noted = {"other_classes": self._other_classes} if self._other_classes else {}
        return origin | self._samples.facts | noted

    def write_npz(self, path: Path) -> None:
        """Write all images with their labels, as evaluation code for ImageNet reads them."""
        write_npz(path, self.batches(), self.shape, self._samples.labels)

    def remove(self) -> None:
        """Delete the files."""
        for start in self._starts:
            self._path(start).unlink()
        for folder in (self.folder, self.folder.parent):
            if not any(folder.iterdir()):  # another evaluation may keep its own there
                folder.rmdir()

    def _sample(self, start: int, progress: Progress | None) -> np.ndarray:
        """Sample the images (n, H, W, C) uint8 of the file that begins with image `start`."""
        samples = self._samples
        labels = samples.labels[start : start + self._size]

        def images_done(done: int, steps: int) -> None:
            if progress is not None:
                progress(start + len(labels) * done // steps, samples.count)

        chunks = samples.generator.images(labels, start, images_done)
        return np.concatenate([self._pixels(chunk) for chunk in chunks])

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        if not np.isfinite(images).all():
            raise DataError(f"{self._samples.trained.origin}: draws pixels that are not finite; the run diverged")
        return to_pixels(images)

    def _missing(self) -> list[int]:
        """Return the first image of each file that is missing or not whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return [start for start in self._starts if not self._is_whole(start)]

    def _is_whole(self, start: int) -> bool:
        path = self._path(start)
        if not path.exists():
            return False
        try:
            images = NpzImages(path)
            found = sum(len(batch) for batch in images.batches())  # reads all of it: the archive holds a checksum
        except DataError as error:
            _log.warning("drawn again: %s", error)
            return False
        return images.shape == self._samples.shape and found == min(self._size, self._samples.count - start)

    def _path(self, start: int) -> Path:
        return self.folder / f"images-{start:09d}.npz"
