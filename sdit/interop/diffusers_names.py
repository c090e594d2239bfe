"""The names of a DiT's weights in diffusers' `DiTTransformer2DModel`, and back. D width."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sdit.errors import ConfigError
from sdit.interop.names import listed

STOCK_CLASS = "DiTTransformer2DModel"

TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDERS = {  # diffusers stores a copy in each block
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
ROWS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # rows 0..D, D..2D and 2D..3D of `attn.qkv`
BLOCK = re.compile(r"(transformer_blocks|blocks)\.(\d+)\.(.+)")
OURS_TOP = {ours: theirs for theirs, ours in TOP.items()}
OURS_IN_BLOCK = {ours: theirs for theirs, ours in IN_BLOCK.items()}
OURS_EMBEDDERS = {ours: theirs for theirs, ours in EMBEDDERS.items()}


def to_diffusers_names(mapping: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain DiT's tensors under the names of `DiTTransformer2DModel`, without the position table.

    Raises: ConfigError: if a name is not one of a plain DiT with labels.
    """
    depth = 1 + max((int(match[2]) for match in map(BLOCK.fullmatch, mapping) if match), default=-1)
    named: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in mapping.items():
        module, _, kind = name.rpartition(".")
        match = BLOCK.fullmatch(module)
        if name == "pos_embed":
            continue
        if module in OURS_TOP:
            named[f"{OURS_TOP[module]}.{kind}"] = tensor
        elif module in OURS_EMBEDDERS:
            named |= {f"transformer_blocks.{i}.{OURS_EMBEDDERS[module]}.{kind}": tensor for i in range(depth)}
        elif match and match[3] in OURS_IN_BLOCK:
            named[f"transformer_blocks.{match[2]}.{OURS_IN_BLOCK[match[3]]}.{kind}"] = tensor
        elif match and match[3] == "attn.qkv":
            rows = zip(ROWS, tensor.chunk(3), strict=True)
            named |= {f"transformer_blocks.{match[2]}.{theirs}.{kind}": part for theirs, part in rows}
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(f"model: {listed(unknown)} have no name in {STOCK_CLASS}; legal: a plain DiT's weights")
    return named


def without_diffusers_names(mapping: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors under published names: `mapping`, converted if its names are those of a `DiTTransformer2DModel`.

    Raises: ConfigError: see `from_diffusers_names`.
    """
    return from_diffusers_names(mapping) if any(name.startswith("transformer_blocks.") for name in mapping) else mapping


def from_diffusers_names(mapping: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a `DiTTransformer2DModel` under published names.

    Raises: ConfigError: if a name is unknown, a part of `attn.qkv` is missing, or the copies of an embedder differ.
    """
    named: dict[str, Tensor] = {}
    attention: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in mapping.items():
        module, _, kind = name.rpartition(".")
        match = BLOCK.fullmatch(module)
        inner = match[3] if match and match[1] == "transformer_blocks" else ""
        if name in TOP:
            named[TOP[name]] = tensor
        elif module in TOP:
            named[f"{TOP[module]}.{kind}"] = tensor
        elif inner in EMBEDDERS:
            ours = f"{EMBEDDERS[inner]}.{kind}"
            if not torch.equal(named.setdefault(ours, tensor), tensor):
                raise ConfigError(f"model: {name} differs from the copy in another block; legal: equal copies")
        elif match and inner in IN_BLOCK:
            named[f"blocks.{match[2]}.{IN_BLOCK[inner]}.{kind}"] = tensor
        elif match and inner in ROWS:
            attention.setdefault(f"blocks.{match[2]}.attn.qkv.{kind}", {})[inner] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(f"model: {listed(unknown)} are not names of {STOCK_CLASS}")
    return named | {name: _joined(name, parts) for name, parts in attention.items()}


def _joined(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    missing = [row for row in ROWS if row not in parts]
    if missing:
        raise ConfigError(f"model: {name} needs {listed(missing)}, which {STOCK_CLASS} has for each block")
    if len({tuple(part.shape) for part in parts.values()}) > 1:
        shapes = ", ".join(str(tuple(parts[row].shape)) for row in ROWS)
        raise ConfigError(f"model: {name}: {', '.join(ROWS)} have shapes {shapes}; legal: equal shapes")
    return torch.cat([parts[row] for row in ROWS])
