"""Sources of images to prepare: the digits, the files of Fashion-MNIST, a folder. C channels, H = W size."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sdit.data.digits import DIGITS_FACTS, digits
from sdit.data.image_list import ImageList
from sdit.data.index import DatasetFacts
from sdit.errors import ConfigError, DataError

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_SIZE = 28
IDX_MAX_BYTES = 2**30


class SourceImage(NamedTuple):
    """One image: `key`, `label`, and `pixels` (C, H, W) uint8 or the error that occurred when it was read."""

    key: str
    pixels: np.ndarray | DataError
    label: int


class ImageSource(Protocol):
    """Images in a fixed order. It can be pickled, so that a subset can be sent to another process."""

    @property
    def facts(self) -> DatasetFacts:
        """The properties that all images share."""
        ...

    @property
    def recipe(self) -> dict[str, Any]:
        """The origin of the images, as JSON. Equal recipes give equal images."""
        ...

    @property
    def labels(self) -> Iterable[int]:
        """The label of each image."""
        ...

    @property
    def listing(self) -> ImageList | None:
        """The files that the images are read from. None for a subset, or if the images are not read from files."""
        ...

    def __len__(self) -> int: ...

    def subset(self, first: int, last: int) -> ImageSource:
        """Return the images from position `first` up to, but excluding, `last`. Their keys do not change."""
        ...

    def images(self) -> Iterator[SourceImage]:
        """Yield all images, in order."""
        ...


def sample_key(position: int) -> str:
    """Return the key of the image at a position of its source."""
    return f"{position:09d}"


@dataclass(frozen=True)
class ArraySource:
    """Images in memory: `pixels` (N, C, H, W) uint8 and `labels` (N,) int64. The first has position `start`."""

    facts: DatasetFacts
    recipe: dict[str, Any]
    pixels: np.ndarray
    labels: np.ndarray
    start: int = 0
    listing = None

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, first: int, last: int) -> ArraySource:
        return replace(self, pixels=self.pixels[first:last], labels=self.labels[first:last], start=self.start + first)

    def images(self) -> Iterator[SourceImage]:
        for offset, (pixels, label) in enumerate(zip(self.pixels, self.labels, strict=True)):
            yield SourceImage(sample_key(self.start + offset), pixels, int(label))


def digits_source() -> ArraySource:
    """Return the 1,797 embedded digits."""
    pixels, labels = digits()
    return ArraySource(DIGITS_FACTS, {"source": "digits", "content": _content(pixels, labels)}, pixels, labels)


def fashion_mnist_source(folder: Path, split: str, pad_to: int | None) -> ArraySource:
    """Return Fashion-MNIST's `train` (60,000) or `test` (10,000) images, 28 x 28 grey.

    If `pad_to` is given, a black border enlarges them to `pad_to` x `pad_to` pixels.

    Raises:
        DataError: if the files are missing or are not Fashion-MNIST's.
        ConfigError: if `pad_to` is less than 28.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    pixels = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", dimensions=3)[:, None]
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", dimensions=1).astype(np.int64)
    if pixels.shape[2:] != (FASHION_SIZE, FASHION_SIZE) or len(pixels) != len(labels):
        raise DataError(
            f"{folder}: {pixels.shape} images and {labels.shape} labels are not Fashion-MNIST's {split} files"
        )
    if labels.max() >= len(FASHION_CLASSES):
        raise DataError(f"{folder}: label {labels.max()} in the {split} files; legal: 0..{len(FASHION_CLASSES) - 1}")
    if pad_to is not None:
        pixels = _padded(pixels, pad_to)
    total, size, names = len(pixels), pixels.shape[-1], FASHION_CLASSES
    facts = DatasetFacts(kind="images", total=total, channels=1, size=size, classes=len(names), class_names=names)
    recipe = {"source": "fashion-mnist", "split": split, "size": facts.size, "content": _content(pixels, labels)}
    return ArraySource(facts, recipe, pixels, labels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the uint8 values of a gzipped IDX file.

    Its header is 0, 0, type 8, the number of dimensions, then the sizes as big-endian uint32.

    Raises: DataError: if the file is missing or is not such a file.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(IDX_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; legal: a folder with Fashion-MNIST's four idx-ubyte.gz files") from None
    except (gzip.BadGzipFile, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be unpacked: {error}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: is not an IDX file of {dimensions}-dimensional bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    if len(data) - header != math.prod(shape) or not math.prod(shape):
        raise DataError(f"{path}: holds {len(data) - header} values, its header says {shape}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _padded(pixels: np.ndarray, size: int) -> np.ndarray:
    border = size - pixels.shape[-1]
    if border < 0:
        raise ConfigError(f"--pad: {size} is less than the images' {pixels.shape[-1]} pixels")
    before = border // 2
    return np.pad(pixels, ((0, 0), (0, 0), (before, border - before), (before, border - before)))


def _content(pixels: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
