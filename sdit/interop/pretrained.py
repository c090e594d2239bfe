"""The folders that `DiffusionTransformer.save_pretrained` writes: config.json, model.safetensors and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdit.config import ModelConfig
from sdit.errors import CheckpointError, ConfigError
from sdit.files import replace_text
from sdit.interop.published import load_published, to_published
from sdit.interop.safetensors_index import INDEX_SUFFIX, read_json_object, read_safetensors, read_safetensors_index
from sdit.interop.weight_files import write_published_file
from sdit.model.build import parse_model_config
from sdit.model.weights import fill_buffers

if TYPE_CHECKING:
    from sdit.model.dit import DiffusionTransformer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"model{INDEX_SUFFIX}"
CONFIG_DEPTH = 4
PATTERNS = [CONFIG, WEIGHTS, INDEX, "model-*.safetensors"]  # files of a Hub repository that are downloaded


def write_pretrained(model: DiffusionTransformer, folder: Path) -> None:
    """Write the weights under published names, and the section `model` of the config.

    Raises: CheckpointError: if a file cannot be written.
    """
    write_published_file(folder / WEIGHTS, to_published(model), {"format": "pt"})
    write_model_config(folder, model.config)


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Write config.json. Raises: CheckpointError: if it cannot be written."""
    try:
        replace_text(folder / CONFIG, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be written: {error.strerror or error}") from None


def load_pretrained(folder: Path, kind: type[Any]) -> Any:
    """Return the model of a folder as an object of the class `kind`, in eval mode.

    Raises:
        CheckpointError: if a file is missing or damaged. The message names the file.
        ConfigError: if config.json is not legal, or the weights do not fit it. The message names the folder.
    """
    try:
        config = parse_model_config(read_json_object(folder / CONFIG, CONFIG_DEPTH))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    is_split = (folder / INDEX).exists() and not (folder / WEIGHTS).exists()
    tensors = read_safetensors_index(folder / INDEX) if is_split else read_safetensors(folder / WEIGHTS)
    with torch.device("meta"):
        model: DiffusionTransformer = kind(config)
    model = model.to_empty(device="cpu")
    fill_buffers(model)
    try:
        load_published(model, tensors)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    return model.eval()


def pretrained_folder(name: str | Path, **options: Any) -> Path:
    """Return the folder `name`, or the local copy of the Hub repository `name`. `options`: those of `snapshot_download`.

    Raises: CheckpointError: if there is no such folder and the repository cannot be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder; legal: a folder, or a Hub id such as OWNER/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS, **options))
    except Exception as error:  # of the network, of the Hub or of the cache
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: no such folder, and cannot be downloaded from the Hub: {reason}") from None
