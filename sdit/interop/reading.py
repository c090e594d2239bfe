"""Reads published weights from a path of any kind: a file, a safetensors index with its files, or a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from sdit.errors import CheckpointError
from sdit.interop.diffusers import WEIGHTS, read_diffusers_folder
from sdit.interop.names import listed
from sdit.interop.safetensors_index import INDEX_SUFFIX, read_safetensors_index
from sdit.interop.weight_files import SUFFIXES, read_published_file, weights_in

INDEX_PATTERN = f"*{INDEX_SUFFIX}"


def read_weights(path: Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Return tensors by published name from the file or folder at `path`.

    `ema`: the averaged weights if the file has them, otherwise the last weights. No code in a file is run.

    Raises:
        CheckpointError: if the path holds nothing readable. The message names the file.
        ConfigError: if a diffusers folder is not that of a DiT.
    """
    if path.is_dir():
        return _read_folder(path, weights)
    if path.match(INDEX_PATTERN):
        return _read_index(path)
    return read_published_file(path, weights, or_model=weights == "ema")


def _read_folder(path: Path, weights: Literal["ema", "model"]) -> dict[str, Tensor]:
    if is_diffusers_folder(path):
        return read_diffusers_folder(path)
    indices = sorted(path.glob(INDEX_PATTERN))
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(indices) == 1:
        return _read_index(indices[0])
    if len(files) == 1 and not indices:
        return read_weights(files[0], weights)
    found = listed(file.name for file in indices or files) or "no weights"
    raise CheckpointError(
        f"{path}: holds {found}; legal: a run, a checkpoint, a diffusers folder, or a folder with one file or index of weights"
    )


def is_diffusers_folder(path: Path) -> bool:
    """Return True if a folder is a pipeline of diffusers, or the folder of its transformer."""
    return (path / "model_index.json").exists() or any(
        next(folder.glob(f"{WEIGHTS}*"), None) is not None for folder in (path, path / "transformer")
    )


def _read_index(path: Path) -> dict[str, Tensor]:
    return weights_in(read_safetensors_index(path), path, "ema")
