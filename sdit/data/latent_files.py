"""The records of LightningDiT's latent shards: safetensors files with `latents`, `latents_flip` and `labels`.

N latents, C channels, H = W size, O orientations. Source: hustvl/LightningDiT, extract_features.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdit.data.names import shown
from sdit.data.record_labels import LabelColumn, as_label, label_column
from sdit.data.records import Listing, Named, row_table
from sdit.errors import CheckpointError, DataError
from sdit.safetensors_file import StoredTensor, read_header

LATENTS, MIRRORED, LABELS = "latents", "latents_flip", "labels"
NO_VARIANCE = -300.0  # exp(-150) is 0 in float32, so a draw from the posterior is the latent itself
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True)
class LatentFile:
    """A safetensors file of latents. If `unlabelled`, its labels are not read."""

    path: Path
    unlabelled: bool = False

    @property
    def shape(self) -> tuple[int, int, bool]:
        """The channels C, the size H = W, and True if the latents of the mirrored images are stored too.

        Raises: DataError: if the file is not of this form.
        """
        tensors = self._tensors()
        _, channels, size, _ = tensors[LATENTS].shape
        return channels, size, MIRRORED in tensors

    def list_records(self) -> Listing:
        tensors = self._tensors()
        count = tensors[LATENTS].shape[0]
        table = row_table(count)
        if self.unlabelled or LABELS not in tensors:
            return Listing(table, LabelColumn(np.zeros(count, np.int64), has_labels=False))
        values = [as_label(value) for value in _mapped(self.path, tensors[LABELS], _INTEGERS).tolist()]
        faults = {row: f"row {row}: has no usable label" for row, label in enumerate(values) if label is None}
        return Listing(table, label_column(values, self.path), faults)

    def read(self, records: np.ndarray) -> Iterator[Named]:
        tensors = self._tensors()
        names = [name for name in (LATENTS, MIRRORED) if name in tensors]
        arrays = [_mapped(self.path, tensors[name], _TYPES) for name in names]
        for row in records["row"].tolist():
            name = f"{self.path}: row {row}"
            latents = np.stack([_floats(array[row]) for array in arrays])
            if np.isfinite(latents).all():
                yield name, np.concatenate([latents, np.full_like(latents, NO_VARIANCE)], axis=1)
            else:
                yield name, DataError(f"{shown(name)}: has latents that are not finite")

    def _tensors(self) -> dict[str, StoredTensor]:
        try:
            tensors = read_header(self.path).tensors
        except CheckpointError as error:
            raise DataError(str(error)) from None
        latents = tensors.get(LATENTS)
        if latents is None or len(latents.shape) != 4 or latents.shape[2] != latents.shape[3]:
            found = "no latents" if latents is None else f"latents of shape {latents.shape}"
            raise DataError(f"{shown(self.path)}: holds {found}; legal: latents (N, C, H, H)")
        wanted = {
            LATENTS: (latents.shape, _TYPES),
            MIRRORED: (latents.shape, _TYPES),
            LABELS: (latents.shape[:1], _INTEGERS),
        }
        for name, (shape, types) in wanted.items():
            tensor = tensors.get(name)
            if tensor is not None and (tensor.shape != shape or tensor.dtype not in types):
                raise DataError(
                    f"{shown(self.path)}: {name} has shape {tensor.shape} and type {tensor.dtype}; "
                    f"legal: {shape} of {', '.join(types)}"
                )
        return tensors


def _mapped(path: Path, tensor: StoredTensor, types: dict[str, str]) -> np.ndarray:
    """Return a tensor without reading it."""
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, types[tensor.dtype])
    return np.memmap(path, types[tensor.dtype], "r", tensor.start, tensor.shape)


def _floats(values: np.ndarray) -> np.ndarray:
    """Return numbers as float32. A bfloat16, read as uint16, is the upper half of a float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
