"""Loads a trained model into one process, from a checkpoint of any layout or from a published file."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdit.checked_files import parse_json
from sdit.checkpoint.files import MANIFEST_DEPTH
from sdit.checkpoint.find import Found, find_checkpoint
from sdit.checkpoint.shard_set import ShardSet
from sdit.clock import Clock
from sdit.config import Config, load_config, parse_stored_config
from sdit.contracts import Precision
from sdit.data.classes import Classes
from sdit.data.identity import DataIdentity, stored_identity, trained_classes
from sdit.errors import CheckpointError, ConfigError
from sdit.interop import SUFFIXES, load_published, read_published_file
from sdit.model import DiffusionTransformer, Experts, build_model, fill_buffers
from sdit.safetensors_file import read_header

Weights = str  # `ema`, the averaged weights, `weight`, those of the last step, or another average such as `ema-0.999`

_log = logging.getLogger(__name__)


class StoredTensors(Protocol):
    """Logical tensors by `KIND/NAME`, as a checkpoint has them."""

    shapes: dict[str, tuple[int, ...]]

    def read_into(self, tensor: str, start: int, target: Tensor) -> None:
        """Fill `target` (n,) with the elements [start, start + n) of a logical tensor."""


@dataclass(frozen=True)
class Trained:
    """A model with all its experts, in eval mode, with the config and the clock of its run.

    `origin` is the folder or file that was read. `data` are the images that it was trained on, None if they are unknown.
    `precision` is that of its products.
    """

    model: DiffusionTransformer
    config: Config
    clock: Clock
    origin: Path
    data: DataIdentity | None = None
    precision: Precision = "fp32"

    @property
    def classes(self) -> Classes:
        """The classes that the model was trained on."""
        return trained_classes(self.config.model, self.data)


def load_trained(
    path: Path, weights: Weights = "ema", config: Path | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """Return the model of a run folder, of a checkpoint folder, or of a published file.

    A published file needs the YAML `config` that fits it, unless the file holds its config.

    Raises:
        CheckpointError: if the path holds nothing readable.
        ConfigError: if a config is missing, not needed, or does not fit the file.
    """
    if path.is_file() or (path.suffix in SUFFIXES and not path.exists()):
        return _load_file(path, weights, config, device)
    if not path.exists() and config is not None:
        raise CheckpointError(f"{path}: no such file or folder")
    if config is not None:
        find_checkpoint(path)
        raise ConfigError(f"--config: {config}: {path} already has a config; legal: only with a published file")
    return load_model(path, weights, device)


def load_model(path: Path, weights: Weights = "ema", device: torch.device | str = "cpu") -> Trained:
    """Return the model of a run folder's newest good checkpoint, or of a checkpoint folder. It is read tensor by tensor.

    Raises: CheckpointError: if there is no good checkpoint, or it does not fit its config.
    """
    found, config = find_trained(path)
    model = build_model(config.model, device="meta")
    with ShardSet(found.folder, found.manifest) as shards:
        check_kind(shards.kinds, weights, found.folder)
        for name, view in logical_tensors(model):  # before memory is allocated: the files may not have this size
            check_tensor(view, shards, weights, name)
        model.to_empty(device=device)
        fill_buffers(model)
        for name, view in logical_tensors(model):
            fill_tensor(view, shards, weights, name)
    return _trained(model.eval(), config, found)


def describe_trained(path: Path) -> Trained:
    """Return the same without reading the weights: the model is on the meta device.

    Raises: CheckpointError: if there is no good checkpoint, or its config is not legal.
    """
    found, config = find_trained(path)
    return _trained(build_model(config.model, device="meta"), config, found)


def _trained(model: DiffusionTransformer, config: Config, found: Found) -> Trained:
    data = stored_identity(found.manifest.get("data"), str(found.folder))
    return Trained(model, config, Clock.from_json(found.manifest["clock"]), found.folder, data)


def find_trained(path: Path) -> tuple[Found, Config]:
    """Return the checkpoint of a path and its config. Damaged newer checkpoints are skipped with a warning.

    Raises: CheckpointError: if there is no good checkpoint, or its config is not legal.
    """
    found = find_checkpoint(path)
    for reason in found.skipped:
        _log.warning("skipped a checkpoint: %s", reason)
    return found, stored_config(found.manifest["config"], str(found.folder))


def stored_config(values: Any, source: str) -> Config:
    """Return the config in a checkpoint or an exported file. Raises: CheckpointError: if it is not a legal config."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{source}: its config is not a mapping of sections")
    try:
        config, dropped = parse_stored_config(values, source)
    except ConfigError as error:
        raise CheckpointError(f"{error} (in the config of the checkpoint)") from None
    for key in dropped:
        _log.warning("%s: %s: an older version stored a credential here; change that password", source, key)
    return config


def logical_tensors(model: DiffusionTransformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint name and a view of each parameter, expert by expert, in the order of `named_parameters`."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Experts):
            for row, expert in enumerate(owner.ids):
                yield f"model.{name}#{expert}", parameter.detach()[row]
        else:
            yield f"model.{name}", parameter.detach()


def check_kind(kinds: Collection[str], weights: Weights, folder: Path) -> None:
    """Raises: ConfigError: if a checkpoint with tensors of `kinds` has no such average."""
    legal = sorted(kind for kind in kinds if kind == "weight" or kind.startswith("ema"))
    if weights not in ("ema", "weight", *legal):
        raise ConfigError(f"--weights: {weights} is not in {folder}; legal: {', '.join(legal)}")


def check_tensor(target: Tensor, shards: StoredTensors, weights: Weights, name: str) -> None:
    """Check that a logical tensor is stored with the shape of `target`.

    Raises: CheckpointError: if it is missing or has another shape.
    """
    key = f"{weights}/{name}"
    stored = shards.shapes.get(key)
    if stored != tuple(target.shape):
        found = "it is missing" if stored is None else f"the checkpoint holds {stored}"
        raise CheckpointError(f"{key}: the model needs shape {tuple(target.shape)}, {found}")


def fill_tensor(target: Tensor, shards: StoredTensors, weights: Weights, name: str) -> None:
    """Read a logical tensor into `target`, which must have its shape.

    Raises: CheckpointError: if it is missing, incomplete or has another shape.
    """
    check_tensor(target, shards, weights, name)
    shards.read_into(f"{weights}/{name}", 0, target.view(-1))


def _load_file(path: Path, weights: Weights, config: Path | None, device: torch.device | str) -> Trained:
    facts = read_header(path).metadata if path.suffix == ".safetensors" and path.exists() else {}
    stored = facts.get("weights", weights)
    if stored != weights:
        raise ConfigError(f"--weights: {weights}, but {path} holds other weights; legal: {stored}")
    tensors = read_published_file(path, "model" if weights == "weight" else "ema")
    if config is not None:
        run = load_config(config)
    elif "config" in facts:
        run = stored_config(parse_json(facts["config"], str(path), "a config", MANIFEST_DEPTH), str(path))
    else:
        raise ConfigError(f"--config: is not set, and {path} does not hold its config; legal: a YAML file")
    model = build_model(run.model, device="meta").to_empty(device=device)
    fill_buffers(model)
    load_published(model, tensors)
    clock = Clock(_count(facts, "images_seen", path), _count(facts, "steps", path))
    data = parse_json(facts["data"], str(path), "data", MANIFEST_DEPTH) if "data" in facts else None
    return Trained(model.eval(), run, clock, path, stored_identity(data, str(path)))


def _count(facts: dict[str, str], name: str, path: Path) -> int:
    text = facts.get(name, "0")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{path}: {name} {text[:100]!r} is not a count")
    return int(text)
