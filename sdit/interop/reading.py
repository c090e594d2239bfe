"""Reads published weights from a path of any kind: a file, a safetensors index with its files, or a diffusers folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdit.checked_files import open_regular, parse_json, read_bytes
from sdit.errors import CheckpointError
from sdit.interop.names import listed
from sdit.interop.weight_files import SUFFIXES, read_published_file, weights_in
from sdit.safetensors_file import read_header

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 1 << 24
INDEX_DEPTH = 3  # weight_map, and the texts and numbers of metadata
PART = re.compile(r"[\w.-]+\.safetensors")  # without a path, so the file is beside the index


def read_weights(path: Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Return tensors by published name from the file or folder at `path`.

    `ema`: the averaged weights if the file has them, otherwise the last weights. No code in a file is run.

    Raises: CheckpointError: if the path holds nothing readable. The message names the file.
    """
    if path.is_dir():
        return _read_folder(path, weights)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path, weights)
    return read_published_file(path, weights, or_model=weights == "ema")


def _read_folder(path: Path, weights: Literal["ema", "model"]) -> dict[str, Tensor]:
    if is_diffusers_folder(path):
        try:
            from sdit.interop.diffusers import read_diffusers_folder  # type: ignore[import-not-found]
        except ImportError:
            raise CheckpointError(f"{path}: this version cannot read a diffusers folder") from None
        tensors: dict[str, Tensor] = read_diffusers_folder(path)
        return tensors
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return _read_sharded(indices[0], weights)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1 and not indices:
        return read_weights(files[0], weights)
    found = listed(file.name for file in indices or files) or "no such file"
    raise CheckpointError(f"{path}: holds {found}; legal: a folder with one file of weights, or one *{INDEX_SUFFIX}")


def is_diffusers_folder(path: Path) -> bool:
    """Return True if a folder is a pipeline of diffusers, or the folder of its transformer."""
    return (path / "model_index.json").exists() or any(
        folder.joinpath("diffusion_pytorch_model.safetensors").exists()
        or folder.joinpath(f"diffusion_pytorch_model{INDEX_SUFFIX}").exists()
        for folder in (path, path / "transformer")
    )


def _read_sharded(index: Path, weights: Literal["ema", "model"]) -> dict[str, Tensor]:
    """Return the tensors of all files that a safetensors index names."""
    payload: dict[str, Tensor] = {}
    for file, names in _files_of(index).items():
        path = index.parent / file
        missing = [name for name in names if name not in read_header(path).tensors]
        if missing:
            raise CheckpointError(f"{path}: does not contain {listed(missing)}, which {index.name} names")
        try:
            with safe_open(path, framework="pt") as tensors:
                payload |= {name: tensors.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return weights_in(payload, index, weights, or_model=True)


def _files_of(index: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each file of a safetensors index."""
    try:
        with open_regular(index) as file:
            content = read_bytes(file, index, MAX_INDEX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from None
    values: Any = parse_json(content, str(index), "a safetensors index", INDEX_DEPTH)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map of names to files")
    files: dict[str, list[str]] = {}
    for name, file_name in places.items():
        if not isinstance(file_name, str) or not PART.fullmatch(file_name):
            raise CheckpointError(f"{index}: {file_name!r:.100} is not the name of a .safetensors file beside it")
        files.setdefault(file_name, []).append(name)
    return files
