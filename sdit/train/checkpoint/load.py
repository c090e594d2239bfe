"""A trained model in one process, from a checkpoint of any layout or from a published file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdit.config import Config
from sdit.configfile import load_config, parse_stored_config
from sdit.data.classes import Classes
from sdit.data.identity import DataIdentity, stored_identity, trained_classes
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import SUFFIXES, load_published, read_published_file
from sdit.model import DiffusionTransformer, Experts, build_model, fill_buffers
from sdit.train.checkpoint.files import ShardSet, manifest_files
from sdit.train.checkpoint.store import Found, find_checkpoint
from sdit.train.clock import Clock

Weights = Literal["ema", "weight"]  # the averaged weights, or those of the last step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model with all its experts, in eval mode, with its run's config and clock; `origin` is what was read.

    `data` are the images that it was trained on; None where the file does not say.
    """

    model: DiffusionTransformer
    config: Config
    clock: Clock
    origin: Path
    data: DataIdentity | None = None

    @property
    def classes(self) -> Classes:
        """The labels that it was trained on."""
        return trained_classes(self.config.model, self.data)


def load_trained(
    path: Path, weights: Weights = "ema", config: Path | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """The model of a run folder, of a checkpoint folder, or of a published file with the YAML `config` that fits it.

    Raises:
        CheckpointError: nothing readable there.
        ConfigError: a config is missing, superfluous, or does not fit the file.
    """
    if path.is_file() or (path.suffix in SUFFIXES and not path.exists()):
        return _load_file(path, weights, config, device)
    if not path.exists() and config is not None:
        raise CheckpointError(f"{path}: no such file or folder")
    if config is not None:
        find_checkpoint(path)
        raise ConfigError(f"--config: {config}: {path} has a config of its own; legal: only with a published file")
    return load_model(path, weights, device)


def load_model(path: Path, weights: Weights = "ema", device: torch.device | str = "cpu") -> Trained:
    """The model of a run folder's newest good checkpoint, or of a checkpoint folder, read tensor by tensor.

    Raises: CheckpointError.
    """
    found, config = find_trained(path)
    model = build_model(config.model, device="meta").to_empty(device=device)
    fill_buffers(model)
    with ShardSet(found.folder, manifest_files(found.manifest)) as shards:
        for part, view in checkpoint_parts(model):
            fill_part(view, shards, weights, part)
    data = stored_identity(found.manifest.get("data"), str(found.folder))
    return Trained(model.eval(), config, Clock.from_json(found.manifest["clock"]), found.folder, data)


def find_trained(path: Path) -> tuple[Found, Config]:
    """The checkpoint a path stands for and its config; a damaged newer one is passed over with a warning."""
    found = find_checkpoint(path)
    for reason in found.skipped:
        _log.warning("skipped a checkpoint: %s", reason)
    return found, _stored_config(found.manifest["config"], found.folder)


def _stored_config(values: dict[str, Any], origin: Path) -> Config:
    config, dropped = parse_stored_config(values, str(origin))
    for key in dropped:
        _log.warning("%s: %s: an older version stored a credential here; change that password", origin, key)
    return config


def checkpoint_parts(model: DiffusionTransformer) -> Iterator[tuple[str, Tensor]]:
    """Name in a checkpoint and view of every parameter, expert by expert; in the order of `named_parameters`."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Experts):
            for row, expert in enumerate(owner.ids):
                yield f"model.{name}#{expert}", parameter.detach()[row]
        else:
            yield f"model.{name}", parameter.detach()


def fill_part(target: Tensor, shards: ShardSet, weights: Weights, part: str) -> None:
    """Read a logical tensor into `target`, which has its shape. Raises: CheckpointError."""
    name = f"{weights}/{part}"
    stored = shards.shapes.get(name)
    if stored != tuple(target.shape):
        found = "it is not there" if stored is None else f"the checkpoint holds {stored}"
        raise CheckpointError(f"{name}: the model needs shape {tuple(target.shape)}, {found}")
    shards.read_into(name, 0, target.view(-1))


def _load_file(path: Path, weights: Weights, config: Path | None, device: torch.device | str) -> Trained:
    facts = _metadata(path)
    held = facts.get("weights", weights)
    if held != weights:
        raise ConfigError(f"--weights: {weights}, but {path} holds the other ones; legal: {held}")
    tensors = read_published_file(path, "ema" if weights == "ema" else "model")
    if config is not None:
        run = load_config(config)
    elif "config" in facts:
        run = _stored_config(json.loads(facts["config"]), path)
    else:
        raise ConfigError(f"--config: is not set, and {path} does not say its config; legal: a YAML file")
    model = build_model(run.model, device="meta").to_empty(device=device)
    fill_buffers(model)
    load_published(model, tensors)
    clock = Clock(int(facts.get("images_seen", 0)), int(facts.get("steps", 0)))
    return Trained(model.eval(), run, clock, path, _data(facts, path))


def _data(facts: dict[str, str], path: Path) -> DataIdentity | None:
    """What an exported file says of the images that its model was trained on."""
    try:
        value = json.loads(facts.get("data", "null"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: data: is not valid JSON") from None
    return stored_identity(value, str(path))


def _metadata(path: Path) -> dict[str, str]:
    """What an exported safetensors file says of itself; nothing for other files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
