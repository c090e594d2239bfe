"""The weights that a new run starts from: random ones, or those of `train.init_from`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch import Tensor

from sdit.checkpoint.find import list_checkpoints
from sdit.checkpoint.load import load_model
from sdit.config import TrainConfig
from sdit.distributed.comm import Comm
from sdit.errors import CheckpointError, ConfigError, SditError
from sdit.interop import (
    convert_flow_weights,
    load_published,
    published_buffers,
    published_parameters,
    read_weights,
)
from sdit.interop.fitting import fit_weights
from sdit.model import DiffusionTransformer
from sdit.safetensors_file import read_header


@dataclass(frozen=True)
class InitialWeights:
    """Weights by published name that were read from `origin`. `allowed` is `train.init_allow`."""

    tensors: dict[str, Tensor]
    origin: str
    allowed: Collection[str]

    def copy_into(self, model: DiffusionTransformer) -> str:
        """Copy the weights into an initialised model, which may hold a subset of the experts. Return what was done, in one line.

        Raises: ConfigError: if they do not fit. Nothing is copied then.
        """
        try:
            fitted = fit_weights(model, self.tensors, self.allowed)
            load_published(model, fitted.tensors, fitted.kept)
        except ConfigError as error:
            raise ConfigError(f"{error} (in train.init_from {self.origin})") from None
        copied = sum(1 for _ in model.parameters()) - len(fitted.kept)
        return "; ".join([f"train.init_from: copied {copied} parameters from {self.origin}", *fitted.notes])


def read_initial_weights(config: TrainConfig, comm: Comm) -> InitialWeights | None:
    """Return the weights of `train.init_from`, or None if it is not set. All ranks call it together, and each reads the files.

    Raises:
        ConfigError: if there is no such path, or the ranks read different weights.
        CheckpointError: if it cannot be read.
    """
    if config.init_from is None:
        return None
    path, tensors, problem, is_setting = Path(config.init_from), dict[str, Tensor](), "", False
    weights: Literal["ema", "model"] = "ema" if config.init_ema else "model"
    try:
        tensors = _read(path, weights)
        if config.init_code is not None:
            tensors = convert_flow_weights(tensors, config.init_code)
    except SditError as error:
        problem, is_setting = str(error), isinstance(error, ConfigError)
    answers = comm.gather([problem, is_setting, _digest(tensors)])
    problems = [answer for answer in answers if answer[0]]
    if problems:
        raise (ConfigError if problems[0][1] else CheckpointError)(f"train.init_from: {problems[0][0]}")
    for rank, (_, _, digest) in enumerate(answers):
        if digest != answers[0][2]:
            raise ConfigError(
                f"train.init_from: {path} holds other weights on rank {rank} than on rank 0; legal: the same on all hosts"
            )
    return InitialWeights(tensors, f"{path} (init_ema {str(config.init_ema).lower()})", config.init_allow)


def _read(path: Path, weights: Literal["ema", "model"]) -> dict[str, Tensor]:
    """Return weights by published name from a run, a checkpoint, or published weights of any form."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; legal: a run, a checkpoint, or published weights")
    if (path / "manifest.json").exists() or list_checkpoints(path / "checkpoints"):
        trained = load_model(path, "ema" if weights == "ema" else "weight")
        return published_parameters(trained.model) | published_buffers(trained.config.model)
    if path.suffix == ".safetensors" and path.is_file():
        stored = read_header(path).metadata.get("weights", "")
        if weights == "model" and stored.startswith("ema"):
            raise ConfigError(f"{path} holds the averaged weights only; legal: train.init_ema true")
    return read_weights(path, weights)


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return a checksum of names and numbers."""
    digest = xxhash.xxh3_128()
    for name, values in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
