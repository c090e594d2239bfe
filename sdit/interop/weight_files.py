"""Reads and writes files of published weights. No code in a file is run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdit.checked_files import open_regular
from sdit.errors import CheckpointError, ConfigError
from sdit.files import replacing_path
from sdit.interop.diffusers_names import without_diffusers_names
from sdit.interop.names import EMA_HOLDERS, listed, published_names
from sdit.interop.safetensors_index import check_finite, load_safetensors
from sdit.pickles import load_tensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # of files that are read
WRITTEN_SUFFIXES = SUFFIXES[:3]
STATES = {  # keys under which training code stores a kind of weights
    "ema": (*sorted(EMA_HOLDERS), "ema_state_dict", "state_dict_ema"),
    "model": ("model", "model_state_dict", "module"),
}


def read_published_file(
    path: str | Path, weights: Literal["ema", "model"] = "ema", or_model: bool = False
) -> dict[str, Tensor]:
    """Return tensors by published name from a .safetensors file or a file of torch.save. No code in the file is run.

    In a file of torch.save, the tensors are at the top level or under a key such as `ema`, `model` or `state_dict`. Wrapper
    names of torch.compile, DDP and FSDP are removed. With `or_model`, a file without averaged weights gives its last weights.

    Raises: CheckpointError: if the file cannot be read or holds no such weights. The message names the file.
    """
    path = Path(path)
    _check_file(path)
    if _suffix(path, SUFFIXES) == ".safetensors":
        return weights_in(load_safetensors(path), path, weights, or_model)
    try:
        payload = load_tensors(path)
    except Exception as error:  # a damaged file can raise any error in the reader
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from None
    return weights_in(payload, path, weights, or_model)


def weights_in(payload: Any, path: Path, weights: Literal["ema", "model"], or_model: bool = False) -> dict[str, Tensor]:
    """Return tensors by published name from the content of the file at `path`, as `read_published_file` does.

    Raises: CheckpointError: if it holds no such weights, or numbers that are not finite.
    """
    state = _find_state(payload, weights)
    if state is None and or_model:
        state = _find_state(payload, "model")
    if state is None:
        if isinstance(payload, dict) and not any(key in payload for key in (*STATES[weights], "state_dict")):
            raise CheckpointError(f"{path}: holds no {weights!r}; it holds {listed(map(str, payload))}")
        raise CheckpointError(f"{path}: {weights!r} is not a mapping of names to tensors")
    check_finite(path, state)
    try:
        named = {name: Tensor.detach(tensor) for name, tensor in published_names(state, weights).items()}
        return dict(without_diffusers_names(named))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _find_state(payload: Any, weights: Literal["ema", "model"]) -> dict[str, Tensor] | None:
    """Return the mapping of names to tensors in the content of a file, or None if there is none."""
    if not isinstance(payload, dict):
        return None
    tensors = {str(name): value for name, value in payload.items() if isinstance(value, Tensor)}
    if tensors and not any(isinstance(value, dict) for value in payload.values()):
        return tensors
    for key in (*STATES[weights], "state_dict"):
        if isinstance(payload.get(key), dict):
            inner = payload[key]
            return _find_state(inner, weights) or _find_state(inner, "model")
    return None


def write_published_file(path: str | Path, mapping: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, or a .pt file with the same tensors under `ema` and `model`, atomically.

    Raises: CheckpointError: if the file cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in mapping.items()}
    suffix = _suffix(path, WRITTEN_SUFFIXES)
    try:
        with replacing_path(path) as partial:
            if suffix == ".safetensors":
                save_file(tensors, partial, metadata=dict(metadata))
            else:
                torch.save({"model": tensors, "ema": tensors, "metadata": dict(metadata)}, partial)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _suffix(path: Path, legal: Sequence[str]) -> str:
    if path.suffix not in legal:
        raise CheckpointError(f"{path}: unknown file type {path.suffix!r}; legal: {', '.join(legal)}")
    return path.suffix


def _check_file(path: Path) -> None:
    """Check that the path is a regular file. Raises: CheckpointError."""
    try:
        with open_regular(path):
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _reason(error: Exception) -> str:
    """Return an error in one line. torch's message about refused code is replaced, because it advises to run the code."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).split("\n", 1)[0]
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds code or objects ({refused[1]}), only tensors are legal" if refused else "it is not a tensor file"
