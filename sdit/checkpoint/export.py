"""Exports a checkpoint to one safetensors file with published names. Only one tensor (or expert) is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

import sdit
from sdit.checkpoint.load import (
    StoredTensors,
    Weights,
    check_kind,
    fill_tensor,
    find_trained,
    load_model,
    logical_tensors,
)
from sdit.checkpoint.shard_set import ShardSet
from sdit.clock import Clock
from sdit.config import Config
from sdit.contracts import Progress
from sdit.data.identity import DataIdentity, stored_identity
from sdit.errors import CheckpointError
from sdit.files import replacing
from sdit.interop import published_buffers, published_expert_name, to_published, write_published_file
from sdit.model import build_model
from sdit.safetensors_file import ITEM_BYTES, TensorEntry, stream_tensors

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
Chunks = Callable[[], Iterator[Tensor]]


def export_safetensors(
    checkpoint: Path, out: Path, weights: Weights, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, str]:
    """Write `out` atomically from a run or checkpoint folder, and return the file's metadata.

    Floats are stored as `dtype`. `progress` is called with (bytes written, all bytes) after each chunk.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or `out` cannot be written.
        ConfigError: if the model of the checkpoint's config cannot be built.
    """
    found, config = find_trained(checkpoint)
    data = stored_identity(found.manifest.get("data"), str(found.folder))
    facts = file_facts(config, Clock.from_json(found.manifest["clock"]), weights, data)
    with ShardSet(found.folder, found.manifest) as shards:
        check_kind(shards.kinds, weights, found.folder)
        write_safetensors(out, model_entries(config, shards, weights, dtype), facts, progress)
    return facts


def model_entries(config: Config, shards: StoredTensors, weights: Weights, dtype: torch.dtype) -> list[TensorEntry]:
    """Return the entries of a model's file: its parameters, which are read when they are written, and the fixed buffers."""
    model = build_model(config.model, device="meta")
    entries = [
        _parameter_entry(name, [*tensors], shards, weights, dtype)
        for name, tensors in groupby(logical_tensors(model), key=lambda tensor: _published_name(tensor[0]))
    ]
    for name, buffer in published_buffers(config.model).items():
        value = buffer.to(dtype) if buffer.is_floating_point() else buffer
        entries.append(tensor_entry(name, value.dtype, value.shape, partial(iter, [value])))
    return entries


def export_pickle(checkpoint: Path, out: Path, weights: Weights, dtype: torch.dtype) -> dict[str, str]:
    """Write a .pt file in the form that published code reads, and return its metadata. The whole model is in memory.

    Raises: CheckpointError: if the checkpoint cannot be read, or `out` cannot be written.
    """
    trained = load_model(checkpoint, weights)
    facts = file_facts(trained.config, trained.clock, weights, trained.data)
    tensors = {
        name: narrowed(name, value, dtype) if value.is_floating_point() else value
        for name, value in to_published(trained.model).items()
    }
    write_published_file(out, tensors, facts)
    return facts


def narrowed(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the finite `value` as `dtype`. Raises: CheckpointError: if a number is out of the range of `dtype`."""
    stored = value.to(dtype)
    if not torch.isfinite(stored).all():
        raise CheckpointError(f"{name}: holds numbers out of the range of {dtype}; legal: a wider --dtype")
    return stored


def file_facts(config: Config, clock: Clock, weights: Weights, data: DataIdentity | None) -> dict[str, str]:
    """Return the metadata of an exported file."""
    known = {} if data is None else {"data": json.dumps(data.model_dump(mode="json"))}
    return known | {
        "format": "pt",
        "sdit": sdit.__version__,
        "variant": config.model.variant,
        "weights": weights,
        "images_seen": str(clock.images_seen),
        "steps": str(clock.steps),
        "config": json.dumps(config.model_dump(mode="json")),
    }


def _published_name(stored: str) -> str:
    """Return the published name that a logical tensor is part of."""
    name, _, expert = stored.removeprefix("model.").partition("#")
    return (published_expert_name(name, int(expert)) if expert else None) or name


def _parameter_entry(
    name: str, tensors: list[tuple[str, Tensor]], shards: StoredTensors, weights: Weights, dtype: torch.dtype
) -> TensorEntry:
    """Return the entry of a parameter. It is read from the checkpoint when it is written, expert by expert."""
    stored, first = tensors[0]
    parameter, _, expert = stored.removeprefix("model.").partition("#")
    is_turned = name != parameter  # one of the token-routed experts, which are stored as (in, out)
    shape = tuple(first.shape)
    if expert:
        shape = shape[::-1] if is_turned else (len(tensors), *shape)

    def read() -> Iterator[Tensor]:
        for stored_name, view in tensors:
            value = torch.empty(view.shape)
            fill_tensor(value, shards, weights, stored_name)
            value = narrowed(f"{weights}/{stored_name}", value, dtype)
            yield value.mT if is_turned and value.dim() == 2 else value

    return tensor_entry(name, dtype, shape, read)


def tensor_entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: Chunks) -> TensorEntry:
    """Return one tensor of a file. `chunks()` yields consecutive chunks, which together have `shape`."""
    return TensorEntry(name, DTYPES[dtype], shape, lambda: map(_bytes, chunks()))


def _bytes(chunk: Tensor) -> memoryview:
    return chunk.contiguous().view(-1).view(torch.uint8).numpy().data


def write_safetensors(
    path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write the tensors one after another, wider types first, so that all tensors are aligned.

    Raises: CheckpointError: if the file cannot be written.
    """
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))
    total = sum(entry.size_bytes for entry in ordered)
    written = 0

    def counted(entry: TensorEntry) -> Iterator[memoryview]:
        nonlocal written
        for data in entry.chunks():
            yield data
            written += data.nbytes
            if progress is not None:
                progress(written, total)

    tensors = [replace(entry, chunks=partial(counted, entry)) for entry in ordered]
    try:
        with replacing(path) as file:
            stream_tensors(tensors, metadata, file.write)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
