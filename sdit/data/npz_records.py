"""The records of an npz file: an array of images and an array of labels.

N images, H x W pixels, C channels: 1 or 3.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sdit.data.names import shown
from sdit.data.record_labels import LabelColumn, as_label, label_column, odd_labels
from sdit.data.records import Listing, Named, row_table
from sdit.data.zip_records import read_local_header
from sdit.errors import DataError

NAMES = (("images", "labels"), ("arr_0", "arr_1"))  # the second pair is what evaluation code for ImageNet writes


@dataclass(frozen=True)
class NpzArchive:
    """An npz file with `images` (N, H, W, C), (N, C, H, W) or (N, H, W) uint8 and `labels` (N,), or arr_0 and arr_1.

    Without labels, or if `unlabelled`, the images have none. An array that is not compressed is not read into memory.
    """

    path: Path
    unlabelled: bool = False

    def list_records(self) -> Listing:
        images, labels = self._names()
        count = len(pixels_of(self.path, images))
        table = row_table(count)
        if labels is None or self.unlabelled:
            return Listing(table, LabelColumn(np.zeros(count, np.int64), has_labels=False))
        array = _array(self.path, labels)
        if array.shape != (count,) or array.dtype.kind not in "iuU":
            raise DataError(
                f"{shown(self.path)}: {labels} has shape {array.shape} and type {array.dtype}; "
                f"legal: ({count},) whole numbers or texts"
            )
        values = [as_label(label) for label in array.tolist()]
        faults = {row: f"image {row}: has the label {array[row]}" for row, label in enumerate(values) if label is None}
        faults |= {row: f"image {row}: {reason}" for row, reason in odd_labels(values).items()}
        return Listing(table, label_column(values, self.path), faults)

    @property
    def pixels(self) -> np.ndarray:
        """The images, see `pixels_of`. Raises: DataError: if the file cannot be read."""
        return pixels_of(self.path, self._names()[0])

    def _names(self) -> tuple[str, str | None]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                present = {name.removesuffix(".npy") for name in archive.namelist()}
        except FileNotFoundError:
            raise DataError(f"{shown(self.path)}: no such file; legal: an npz file") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{shown(self.path)}: cannot be read as an npz file: {error}") from None
        for images, labels in NAMES:
            if images in present:
                return images, labels if labels in present else None
        raise DataError(
            f"{shown(self.path)}: holds {', '.join(sorted(present)) or 'nothing'}; legal: images and labels, or arr_0 and arr_1"
        )

    def read(self, records: np.ndarray) -> Iterator[Named]:
        pixels = self.pixels
        for row in records["row"].tolist():
            yield f"{self.path}: image {row}", np.ascontiguousarray(pixels[row])


@lru_cache(maxsize=1)
def pixels_of(path: Path, name: str) -> np.ndarray:
    """Return the images (N, H, W) or (N, H, W, C) uint8 of an npz file, mapped from the file if it is not compressed.

    Raises: DataError: if the array is not of this form.
    """
    pixels = _mapped(path, name)
    if pixels is None:
        pixels = _array(path, name)
    if pixels.ndim == 4 and pixels.shape[-1] not in (1, 3) and pixels.shape[1] in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in (1, 3)):
        raise DataError(
            f"{shown(path)}: {name} has shape {pixels.shape} and type {pixels.dtype}; "
            "legal: (N, H, W, C), (N, C, H, W) or (N, H, W) of type uint8, with C 1 or 3"
        )
    if not pixels.size:
        raise DataError(f"{shown(path)}: {name} holds no images")
    return pixels


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array: np.ndarray = arrays[name]
            return array
    except Exception as error:  # numpy parses the header as Python text, which raises almost anything on hostile bytes
        raise DataError(f"{shown(path)}: {name} cannot be read: {str(error) or type(error).__name__}") from None


def _mapped(path: Path, name: str) -> np.ndarray | None:
    """Return an array of a npz file without reading it. Return None if it is compressed or has an unusual form."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        member = archive.getinfo(f"{name}.npy")
        header = read_local_header(file.fileno(), member.header_offset)
        if header is None or member.compress_type != zipfile.ZIP_STORED:
            return None
        start = member.header_offset + header.length
        file.seek(start)
        try:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, column_major, dtype = read[np.lib.format.read_magic(file)](file)
        except Exception:  # a damaged header can raise any error; `_array` reads the file again and reports it
            return None
        whole = file.tell() - start + int(np.prod(shape)) * dtype.itemsize == member.file_size
        if column_major or dtype != np.uint8 or not whole or start + member.file_size > os.fstat(file.fileno()).st_size:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape)
