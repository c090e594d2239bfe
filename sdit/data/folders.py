"""A folder of images, one subfolder a class, as square pictures of one size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdit import randomness
from sdit.data.decode import IMAGE_FORMATS, MODES
from sdit.data.index import DatasetFacts
from sdit.data.sources import Picture, sample_key
from sdit.errors import DataError
from sdit.randomness import Purpose

MAX_PIXELS = 2**26  # a 200 MB RGB image; a small file can claim far more


@dataclass(frozen=True)
class FolderSource:
    """Images `files`, (path under `root`, label), the first at position `start`; cropped when they are read."""

    facts: DatasetFacts
    recipe: dict[str, Any]
    root: Path
    files: tuple[tuple[str, int], ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def part(self, first: int, last: int) -> FolderSource:
        return replace(self, files=self.files[first:last], start=self.start + first)

    def pictures(self) -> Iterator[Picture]:
        for offset, (name, label) in enumerate(self.files):
            yield Picture(sample_key(self.start + offset), self._pixels(name), label)

    def _pixels(self, name: str) -> np.ndarray | DataError:
        try:
            return read_picture(self.root / name, self.facts.size, self.facts.channels)
        except DataError as error:
            return error


def folder_source(root: Path, size: int, channels: int) -> FolderSource:
    """All images under `root`: labels number the sorted subfolders; without subfolders the images are unlabelled.

    The sorted list is shuffled once, by a fixed key, so that every shard holds all classes: a batch draws from a few
    shards only.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; legal: a folder with one subfolder of images for each class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    listed = [(name, label) for label, each in enumerate(classes) for name in _image_names(root, root / each)]
    if not classes:
        listed = [(name, 0) for name in _image_names(root, root)]
    if not listed:
        raise DataError(f"{root}: holds no images; legal suffixes: {', '.join(IMAGE_FORMATS)}")
    order = randomness.permutation(randomness.keys(0, Purpose.PREPARATION_ORDER), len(listed))
    files = tuple(listed[position] for position in order)
    facts = DatasetFacts(
        kind="images",
        total=len(files),
        channels=channels,
        size=size,
        classes=len(classes),
        class_names=tuple(classes),
    )
    recipe = {"source": "folder", "size": size, "channels": channels, "content": _content(root, files)}
    return FolderSource(facts, recipe, root, files)


def read_picture(path: Path, size: int, channels: int) -> np.ndarray:
    """Pixels (C, size, size) uint8 of an image file's central square; DataError naming the file if it has none."""
    try:
        with Image.open(path, formats=sorted(set(IMAGE_FORMATS.values()))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels; legal: up to {MAX_PIXELS} in all")
            pixels = np.asarray(center_crop(image.convert(MODES[channels]), size))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        raise DataError(f"{path}: cannot be decoded: {error}") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, `size` pixels wide.

    Halved with a box filter while both sides are at least twice too long, then resized (bicubic) until the short side
    fits, then cropped: the preprocessing of ADM (Dhariwal and Nichol 2021), on which the published FIDs rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _image_names(root: Path, folder: Path) -> list[str]:
    """Sorted paths, under `root`, of the images in a folder and its subfolders; hidden files are none."""
    return sorted(
        str((Path(parent) / name).relative_to(root))
        for parent, _, names in os.walk(folder)
        for name in names
        if name.rpartition(".")[2].lower() in IMAGE_FORMATS and not name.startswith(".")
    )


def _content(root: Path, files: tuple[tuple[str, int], ...]) -> str:
    """A fingerprint of the images' names, labels and sizes in bytes; their contents are too much to read twice."""
    digest = hashlib.sha256()
    for name, label in files:
        digest.update(f"{name}\0{label}\0{(root / name).stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
