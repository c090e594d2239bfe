"""Reads weights that are split over several safetensors files, as huggingface's libraries write large models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdit.checked_files import open_regular, parse_json, read_bytes
from sdit.errors import CheckpointError
from sdit.interop.names import listed
from sdit.safetensors_file import read_header

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX_BYTES = 1 << 26
INDEX_DEPTH = 2  # the object, then `metadata` and `weight_map`


def read_safetensors_index(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors by name, as stored, that a `*.safetensors.index.json` lists.

    The index maps each tensor to a file in the same folder.

    Raises: CheckpointError: if a file is missing or damaged, a tensor is not where the index says, a file holds others, or
        a number is not finite. The message names the file.
    """
    path = Path(path)
    files = _files(path)
    tensors: dict[str, Tensor] = {}
    for file, names in files.items():
        stored = read_safetensors(path.parent / file)
        if stored.keys() != names:
            missing, others = sorted(names - stored.keys()), sorted(stored.keys() - names)
            problem = f"does not contain {listed(missing)}" if missing else f"also holds {listed(others)}"
            raise CheckpointError(f"{path.parent / file}: {problem}; legal: the tensors that {path.name} lists")
        tensors |= stored
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors file by name.

    Raises: CheckpointError: if the file is missing or damaged, or a number is not finite. The message names the file.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    tensors = load_safetensors(path)
    check_finite(path, tensors)
    return tensors


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the same tensors without a check of their numbers."""
    read_header(path)
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can raise any error in the reader
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


@torch.no_grad()
def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that all numbers of the file at `path` are finite. One-byte floats are converted to float32 for the test.

    Raises: CheckpointError: if one is not.
    """
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    bad = [name for name, v in floats.items() if not torch.isfinite(v.float() if v.itemsize == 1 else v).all()]
    if bad:
        raise CheckpointError(f"{path}: {listed(bad)} hold{'s' * (len(bad) == 1)} NaN or infinite numbers")


def _files(path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors of each file that the index lists."""
    weight_map = read_json_object(path, INDEX_DEPTH).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is not a mapping of tensors to files")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            legal = "a .safetensors file in the same folder"
            raise CheckpointError(f"{path}: {name[:80]} is in {str(file)[:80]!r}; legal: {legal}")
        files.setdefault(file, set()).add(name)
    return files


def read_json_object(path: Path, depth: int) -> dict[str, object]:
    """Return the object in a JSON file whose nesting is at most `depth`.

    Raises: CheckpointError: if the file is missing, is not JSON or holds something else. The message names the file.
    """
    try:
        with open_regular(path) as file:
            value = parse_json(read_bytes(file, path, MAX_INDEX_BYTES), str(path), "JSON", depth)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
