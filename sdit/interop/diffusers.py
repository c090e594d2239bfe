"""diffusers' form of DiT (`DiTTransformer2DModel`): its names, its config, and the folder that its pipelines read.

diffusers computes another function from the same weights. Its time frequencies are 10000^(-i/127), not 10000^(-i/128), and
the norm of its MLP branch has eps `norm_eps`, 1e-5 by default, not 1e-6. Weights are read as DiT's, because conversions from
DiT do not change them. D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sdit.config import ModelConfig
from sdit.errors import CheckpointError, ConfigError
from sdit.interop.diffusers_config import STOCK_CLASSES, model_config_of
from sdit.interop.diffusers_names import from_diffusers_names
from sdit.interop.safetensors_index import INDEX_SUFFIX, read_json_object, read_safetensors, read_safetensors_index
from sdit.interop.weight_files import read_published_file

WEIGHTS = "diffusion_pytorch_model"  # the first part of the names of files of weights
CONFIG_DEPTH = 2  # the object, and the sections `experts` and `dtr`


def read_diffusers_folder(path: str | Path) -> dict[str, Tensor]:
    """Return the weights of a diffusers folder under published names.

    `path` is a pipeline's folder or its `transformer/`. The weights are one safetensors file, an index of several, or a
    `.bin` file, of which no code is run.

    Raises:
        CheckpointError: if a file is missing or damaged. The message names the file.
        ConfigError: if the config, the names or the shapes are not those of a DiT. The message names the folder.
    """
    folder, config = _transformer(Path(path))
    model = model_config_of(config, str(folder))
    tensors = _weights(folder)
    if config.get("_class_name") in STOCK_CLASSES and "x_embedder.proj.weight" not in tensors:
        try:
            tensors = from_diffusers_names(tensors)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None
    expected = tensors.get("x_embedder.proj.weight")
    shape = (model.width, model.channels, model.patch_size, model.patch_size)
    if expected is None or tuple(expected.shape) != shape:
        found = "missing" if expected is None else f"of shape {tuple(expected.shape)}"
        raise ConfigError(f"{folder}: x_embedder.proj.weight is {found}; legal: {shape}, as its config.json says")
    return tensors


def read_diffusers_config(path: str | Path) -> ModelConfig:
    """Return the model that a diffusers folder, a pipeline's or its `transformer/`, holds.

    Raises:
        CheckpointError: if its config.json is missing or damaged.
        ConfigError: if it is not that of a DiT.
    """
    folder, config = _transformer(Path(path))
    return model_config_of(config, str(folder))


def _transformer(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the transformer and its config."""
    inner = path / "transformer"
    folder = inner if inner.is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    return folder, read_json_object(folder / "config.json", CONFIG_DEPTH)


def _weights(folder: Path) -> dict[str, Tensor]:
    single, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}{INDEX_SUFFIX}"
    pickled = folder / f"{WEIGHTS}.bin"
    if single.exists() or not (index.exists() or pickled.exists()):
        return read_safetensors(single)
    return read_safetensors_index(index) if index.exists() else read_published_file(pickled)
