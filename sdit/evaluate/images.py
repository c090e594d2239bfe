"""Sets of images to read: the digits, a prepared folder, a folder of image files, an npz as of ADM; and back to an npz.

n images, H x W pixels, C channels.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from sdit.data.dataset import Dataset, EmbeddedDigits, PreparedFolder
from sdit.errors import ConfigError, DataError
from sdit.evaluate.trees import ImageTree, Shape, is_tree, open_tree
from sdit.files import replacing

BATCH = 500


class ImageSet(Protocol):
    """Images of the same `shape` (H, W, C) that can be read again and again."""

    name: str
    count: int
    shape: Shape

    def batches(self) -> Iterator[np.ndarray]:
        """All images in order, (n, H, W, C) uint8."""


def open_images(source: str, skip_bad: bool = False) -> ImageSet | ImageTree:
    """The images of `digits`, of a folder, or of an npz file. Those of a tree of files have no common shape yet.

    Raises: DataError, ConfigError.
    """
    path = Path(source)
    if source == "digits":
        return LabelledImages(source, EmbeddedDigits())
    if is_tree(path):
        return open_tree(path, skip_bad)
    if path.is_dir():
        return LabelledImages(source, PreparedFolder(path))
    if source.endswith(".npz"):
        return NpzImages(path)
    problem = "is no npz" if path.exists() else "no such file or folder"
    raise DataError(f"{path}: {problem}; legal: digits, a prepared folder, a folder of image files, or an npz")


class LabelledImages:
    """The images of a data set."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        facts = dataset.facts
        if facts.kind != "images":
            raise ConfigError(f"{name}: holds latents; legal: a folder of images")
        self.name, self.count, self.classes = name, facts.total, facts.classes
        self.class_names = facts.class_names
        self.shape = (facts.size, facts.size, facts.channels)
        self._dataset = dataset

    def batches(self) -> Iterator[np.ndarray]:
        for pixels, _ in self._labelled():
            yield pixels

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images (N, H, W, C) uint8 and labels (N,) int64 in memory."""
        pixels, labels = zip(*self._labelled(), strict=True)
        return np.concatenate(pixels), np.concatenate(labels)

    def _labelled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, count in enumerate(self._dataset.counts):
            shard = self._dataset.open(number)
            for start in range(0, count, BATCH):
                samples = [shard.sample(member) for member in range(start, min(start + BATCH, count))]
                pixels = np.stack([sample.values for sample in samples])
                labels = np.array([sample.label for sample in samples], dtype=np.int64)
                yield pixels.transpose(0, 2, 3, 1), labels


class NpzImages:
    """arr_0 (N, H, W, C) uint8 of an npz, read piece by piece: 50,000 images of 256 x 256 pixels are 9.8 GB."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        with self._values() as (_, shape, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise DataError(f"{path}: arr_0 is {dtype} {shape}; legal: uint8 (N, H, W, 1 or 3)")
        self.count, self.shape = shape[0], (shape[1], shape[2], shape[3])

    def batches(self) -> Iterator[np.ndarray]:
        with self._values() as (file, _, _):
            for start in range(0, self.count, BATCH):
                shape = (min(BATCH, self.count - start), *self.shape)
                data = file.read(math.prod(shape))
                if len(data) < math.prod(shape):
                    raise DataError(f"{self._path}: arr_0 ends before its {self.count} images")
                yield np.frombuffer(data, np.uint8).reshape(shape)

    @contextmanager
    def _values(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The file of arr_0's values, after its header, which says their shape and dtype."""
        with readable_npz(self._path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise DataError(f"{self._path}: holds no arr_0; legal: images (N, H, W, C) uint8 under that name")
            with archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, column_major, dtype = read(file)
                if column_major:
                    raise DataError(f"{self._path}: arr_0 is in Fortran order; legal: C order")
                yield file, shape, dtype


@contextmanager
def readable_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Yield the archive. Any error while it is read becomes one DataError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as npz: {error}") from None


def write_npz(path: Path, batches: Iterator[np.ndarray], shape: Shape, labels: np.ndarray) -> None:
    """Write images as arr_0 (N, H, W, C) uint8 and labels as arr_1 (N,) int64, piece by piece."""
    with replacing(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(np.ascontiguousarray(batch).data)
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels, allow_pickle=False)
