"""Fits published weights to a model that differs from theirs: dense into experts, another resolution, other classes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.errors import ConfigError
from sdit.interop.published import POSITIONS, table_tolerance
from sdit.model.dit import DiffusionTransformer
from sdit.model.embedding import grid_positions
from sdit.model.rope import rope_tables

LABELS = "y_embedder.embedding_table.weight"
ROUTERS = "routers."
NEW_OF_MOE = re.compile(r"blocks\.\d+\.moe\.(gate|shared_experts)\.")
MLP_LEAVES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True)
class Fitted:
    """The `tensors` to copy by name, the names of the parameters that are `kept` as initialised, and what is new."""

    tensors: dict[str, Tensor]
    kept: frozenset[str]
    notes: tuple[str, ...]


def fit_weights(model: DiffusionTransformer, given: Mapping[str, Tensor], allowed: Collection[str]) -> Fitted:
    """Return what of the `given` weights the model takes. `allowed`: `train.init_allow`.

    Experts and gates stay as initialised if the weights are of a model without routers. The experts then give zero, so that the
    output is that of the dense model. If the model has token-routed experts and the weights have an MLP, each expert becomes a
    copy of it. Token gates and shared experts stay as initialised.

    Raises: ConfigError: if positions or labels are of another model and not allowed, or positions are not sin-cos.
    """
    tensors, kept, notes = dict(given), set[str](), list[str]()
    names = [name for name, _ in model.named_parameters()]
    routers = [name for name in names if name.startswith(ROUTERS)]
    if routers and not any(name.startswith(ROUTERS) for name in given):
        kept |= set(routers)
        notes.append("experts and gates are new, and the experts give zero: the output is that of the dense model")
    if model.config.moe is not None and (dense := _blocks_with_mlp(model.config, given)):
        tensors = _copied_into_experts(model.config, tensors, dense)
        kept |= {name for name in names if NEW_OF_MOE.match(name)}
        notes.append(_moe_note(model.config))
    positions = _other_positions(model.config, given)
    if positions:
        _require("positions", positions, allowed)
        notes.append(f"{positions}: the model's own are used")
        tensors = {name: values for name, values in tensors.items() if not _is_position(name)}
    labels = _other_labels(model, given)
    if labels:
        _require("labels", labels, allowed)
        notes.append(f"{labels}: the label table is drawn anew")
        tensors.pop(LABELS, None)
        kept |= {LABELS} & set(names)
    return Fitted(tensors, frozenset(kept), tuple(notes))


def _blocks_with_mlp(config: ModelConfig, given: Mapping[str, Tensor]) -> list[int]:
    """Return the blocks that have token-routed experts in the model and an MLP in the weights."""
    return [block for block in config.moe_blocks if f"blocks.{block}.mlp.fc1.weight" in given]


def _copied_into_experts(config: ModelConfig, given: Mapping[str, Tensor], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights with each expert of these blocks as the MLP of the block. The copies share its memory.

    Raises: ConfigError: if an expert is another network than the MLP.
    """
    assert config.moe is not None
    hidden, tensors = config.moe.hidden(config.width), dict(given)
    theirs = len(given[f"blocks.{blocks[0]}.mlp.fc1.weight"])
    if config.moe.kind != "mlp" or theirs != hidden or config.activation != "gelu":
        raise ConfigError(
            f"model.moe: experts of kind {config.moe.kind} and hidden width {hidden} cannot be copies of an MLP with GELU of "
            f"hidden width {theirs}; legal: kind mlp and hidden_ratio {theirs / config.width:g}"
        )
    for block, leaf in product(blocks, MLP_LEAVES):
        values = tensors.pop(f"blocks.{block}.mlp.{leaf}", None)
        if values is not None:
            tensors |= {f"blocks.{block}.moe.experts.{expert}.{leaf}": values for expert in range(config.moe.experts)}
    return tensors


def _moe_note(config: ModelConfig) -> str:
    """Return in one line what became of the MLPs, and whether the output is that of the dense model."""
    moe = config.moe
    assert moe is not None
    outcome = "the output is that of the dense model"
    if moe.router != "token" or not moe.renormalize or moe.scale != 1 or moe.capacity_factor is not None or moe.shared:
        needed = "router token, renormalize true, scale 1, shared 0 and capacity_factor null"
        outcome = f"the output is not that of the dense model, which needs {needed}"
    return f"each token-routed expert is a copy of its block's MLP, and token gates are new: {outcome}"


def _require(what: str, fact: str, allowed: Collection[str]) -> None:
    if what not in allowed:
        raise ConfigError(f"train.init_allow: {list(allowed)}, but {fact}; legal: with {what}, or weights that fit")


def _is_position(name: str) -> bool:
    return name == POSITIONS or name.startswith("feat_rope.")


def _other_positions(config: ModelConfig, given: Mapping[str, Tensor]) -> str:
    """Return how the resolution of the weights differs, or an empty string. Positions of another size must be those of it."""
    ours = config.side
    sides: set[int] = set()
    for name in filter(_is_position, given):
        tokens = given[name].shape[-2] if given[name].dim() >= 2 else 0
        side = math.isqrt(tokens)
        if side == 0 or side * side != tokens:
            raise ConfigError(f"train.init_from: {name} has shape {tuple(given[name].shape)}; legal: one row per token")
        if side != ours:
            _check_positions(config, name, given[name], side)
            sides.add(side)
    if not sides:
        return ""
    return f"its positions are of side {', '.join(map(str, sorted(sides)))}, the model's of side {ours}"


def _check_positions(config: ModelConfig, name: str, values: Tensor, side: int) -> None:
    """Check positions of another size against those of their own side, as they are or scaled to `model.position_base`."""
    tolerance = table_tolerance(name, side, values.dtype) if values.is_floating_point() else 0.0
    for base in {None, config.position_base}:
        want = grid_positions(side, values.shape[-1], base)
        if name != POSITIONS:
            want = rope_tables(side, values.shape[-1], base)[name.endswith("sin")]
        if values.shape == want.shape and torch.allclose(values.float(), want, rtol=0, atol=tolerance):
            return
    legal = "positions as published" + (f", or scaled to {config.position_base}" if config.position_base else "")
    raise ConfigError(f"train.init_from: {name} is not the fixed table of side {side}; legal: {legal}")


def _other_labels(model: DiffusionTransformer, given: Mapping[str, Tensor]) -> str:
    """Return how the labels of the weights differ, or an empty string. A table has a row for each class and the null row."""
    rows = len(given[LABELS]) if LABELS in given and given[LABELS].dim() == 2 else 0
    theirs, ours = max(0, rows - 1), model.config.classes
    return "" if theirs == ours else f"it has a table of {theirs} classes, model.classes is {ours}"
