"""Run folders made without training: a checkpoint with random weights, in pieces as two ranks would leave them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdit.checkpoint.files import FORMAT, write_manifest, write_shard
from sdit.config import Config, load_config
from sdit.model import DiffusionTransformer, build_model

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "depth": 2, "width": 16, "heads": 2, "patch_size": 2, "input_size": 4, "channels": 1, "classes": 5,
        "timesteps": 50, "experts": {"count": 3, "top_k": 2},
    },
    "diffusion": {"prediction": "x0", "clip_x0": "fixed"},  # x0: the sampler does not multiply rounding errors
    "train": {"steps": 7, "global_batch": 4},
    "sample": {"steps": 3, "images_per_class": 2, "classes": 3},
}  # fmt: skip


def tiny_config(*overrides: str) -> Config:
    """A model of a few thousand weights."""
    return load_config(None, overrides, copy.deepcopy(TINY))


def random_model(config: Config, seed: int) -> DiffusionTransformer:
    """A model in which no weight is zero."""
    model = build_model(config.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logical_tensors(model: DiffusionTransformer) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the format documents them: `model.PARAMETER`, and `model.PARAMETER#EXPERT` of experts."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            yield from ((f"model.{name}#{expert}", row) for expert, row in enumerate(parameter.detach().unbind()))
        else:
            yield f"model.{name}", parameter.detach()


def write_run(folder: Path, config: Config, images_seen: int = 28) -> dict[str, DiffusionTransformer]:
    """Write a checkpoint of two shards into the run `folder`; return the models by kind of weights."""
    models = {"weight": random_model(config, 1), "ema": random_model(config, 2)}
    shards: Sequence[dict[str, np.ndarray]] = ({}, {})
    shapes = {}
    for kind, model in models.items():
        for name, view in logical_tensors(model):
            flat, cut = view.reshape(-1).numpy(), view.numel() // 3
            shapes[f"{kind}/{name}"] = tuple(view.shape)
            for shard, start, piece in ((0, 0, flat[:cut]), (1, cut, flat[cut:])):
                if len(piece):
                    shards[shard][f"{kind}/{name}@{start}"] = piece.copy()
    target = folder / "checkpoints" / f"images-{images_seen:012d}"
    target.mkdir(parents=True)
    records = [
        write_shard(target, f"shard-{number:05d}.safetensors", shard, shapes) for number, shard in enumerate(shards)
    ]
    clock = {"images_seen": images_seen, "steps": images_seen // config.train.global_batch}
    files = [record.to_json() for record in records]
    body = {
        "format": FORMAT,
        "files": files,
        "clock": clock,
        "config": config.model_dump(mode="json"),
        "prior_columns": None,
    }
    write_manifest(target, body)
    return models
