"""A trained model in one process, from a checkpoint of any layout or from a published file."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdit.checked_files import parse_json
from sdit.checkpoint.files import MANIFEST_DEPTH, ShardSet, manifest_files
from sdit.checkpoint.store import Found, find_checkpoint
from sdit.clock import Clock
from sdit.config import Config, load_config, parse_stored_config
from sdit.data.classes import Classes
from sdit.data.identity import DataIdentity, stored_identity, trained_classes
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import SUFFIXES, load_published, read_published_file
from sdit.model import DiffusionTransformer, Experts, build_model, fill_buffers
from sdit.safetensors_file import read_header

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
    model = build_model(config.model, device="meta")
    with ShardSet(found.folder, manifest_files(found.manifest)) as shards:
        for part, view in checkpoint_parts(model):  # before memory is taken for a size that the files may not have
            check_part(view, shards, weights, part)
        model.to_empty(device=device)
        fill_buffers(model)
        for part, view in checkpoint_parts(model):
            fill_part(view, shards, weights, part)
    data = stored_identity(found.manifest.get("data"), str(found.folder))
    return Trained(model.eval(), config, Clock.from_json(found.manifest["clock"]), found.folder, data)


def find_trained(path: Path) -> tuple[Found, Config]:
    """The checkpoint a path stands for and its config; a damaged newer one is passed over with a warning."""
    found = find_checkpoint(path)
    for reason in found.skipped:
        _log.warning("skipped a checkpoint: %s", reason)
    return found, stored_config(found.manifest["config"], str(found.folder))


def stored_config(values: Any, source: str) -> Config:
    """The config that a checkpoint or an exported file carries. Raises: CheckpointError when it is not a legal one."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: its config is not a mapping of sections")
    try:
        config, dropped = parse_stored_config(values, source)
    except ConfigError as error:
        raise CheckpointError(f"{error} (the config that the checkpoint holds)") from None
    for key in dropped:
        _log.warning("%s: %s: an older version stored a credential here; change that password", source, key)
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


def check_part(target: Tensor, shards: ShardSet, weights: Weights, part: str) -> None:
    """Raises: CheckpointError when a logical tensor does not have the shape of `target`."""
    name = f"{weights}/{part}"
    stored = shards.shapes.get(name)
    if stored != tuple(target.shape):
        found = "it is not there" if stored is None else f"the checkpoint holds {stored}"
        raise CheckpointError(f"{name}: the model needs shape {tuple(target.shape)}, {found}")


def fill_part(target: Tensor, shards: ShardSet, weights: Weights, part: str) -> None:
    """Read a logical tensor into `target`, which has its shape. Raises: CheckpointError."""
    check_part(target, shards, weights, part)
    shards.read_into(f"{weights}/{part}", 0, target.view(-1))


def _load_file(path: Path, weights: Weights, config: Path | None, device: torch.device | str) -> Trained:
    facts = _metadata(path)
    held = facts.get("weights", weights)
    if held != weights:
        raise ConfigError(f"--weights: {weights}, but {path} holds the other ones; legal: {held}")
    tensors = read_published_file(path, "ema" if weights == "ema" else "model")
    if config is not None:
        run = load_config(config)
    elif "config" in facts:
        run = stored_config(parse_json(facts["config"], str(path), "a config", MANIFEST_DEPTH), str(path))
    else:
        raise ConfigError(f"--config: is not set, and {path} does not say its config; legal: a YAML file")
    model = build_model(run.model, device="meta").to_empty(device=device)
    fill_buffers(model)
    load_published(model, tensors)
    clock = Clock(_count(facts, "images_seen", path), _count(facts, "steps", path))
    return Trained(model.eval(), run, clock, path, _data(facts, path))


def _data(facts: dict[str, str], path: Path) -> DataIdentity | None:
    """What an exported file says of the images that its model was trained on."""
    value = parse_json(facts["data"], str(path), "data", MANIFEST_DEPTH) if "data" in facts else None
    return stored_identity(value, str(path))


def _metadata(path: Path) -> dict[str, str]:
    """What an exported safetensors file says of itself; nothing for other files."""
    return read_header(path).metadata if path.suffix == ".safetensors" and path.exists() else {}


def _count(facts: dict[str, str], name: str, path: Path) -> int:
    text = facts.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{path}: {name} {text[:100]!r} is not a count")
    return int(text)
