"""Copies published DiT, DTR and Switch-DiT weights into sdit's models and back. T tasks, M experts of a block, D width."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdit.config import ModelConfig
from sdit.errors import ConfigError
from sdit.interop.diffusers_names import without_diffusers_names
from sdit.interop.moe_names import published_expert_name, without_moe_names
from sdit.interop.names import listed, published_names
from sdit.model.dit import DiffusionTransformer
from sdit.model.embedding import grid_positions
from sdit.model.moe.base import Experts
from sdit.model.rope import rope_tables
from sdit.model.windows import TaskWindows, channel_windows, expert_windows

POSITIONS = "pos_embed"
ROPE = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
PRIOR_MASK = "prior._unit_mapping"
TASKS = "full_time"
CHANNEL_MASK = re.compile(r"routers\.\d+\._unit_mapping")


@torch.no_grad()
def load_published(
    model: DiffusionTransformer, mapping: Mapping[str, Tensor | np.ndarray], kept: Collection[str] = ()
) -> None:
    """Copy published weights (tensors or arrays) of any float dtype into the model. Names of diffusers' DiT, DSMoE and
    EC-DiT are legal too.

    The model may hold a subset of the M experts. The parameters in `kept` stay as they are, and are not in the mapping.

    Raises: ConfigError: if names, shapes or fixed buffers do not fit the model's config. Nothing is copied then.
    """
    try:
        given = {name: torch.as_tensor(values) for name, values in published_names(mapping, "ema").items()}
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    given = without_moe_names(model.config, without_diffusers_names(given))
    wanted = {name: target for name, target in _targets(model) if target.parameter not in kept}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not _is_buffer(name)]
    if missing or unexpected:
        kinds = {"does not contain": missing, "also has": unexpected}
        problem = " and ".join(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
        raise ConfigError(f"model: the checkpoint {problem}; legal: the names of {_summary(model.config)}")
    misfits = [text for name, target in wanted.items() if (text := _misfit(name, given[name], target.shape))]
    if misfits:
        raise ConfigError(f"model: {listed(misfits)}; legal: the shapes of {_summary(model.config)}")
    _check_buffers(model.config, given)
    for name, (_, _, view, ids) in wanted.items():
        if view is not None:
            view.copy_(given[name] if ids is None else given[name][list(ids)])


@torch.no_grad()
def to_published(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Return CPU copies of all weights with their published names.

    The fixed buffers that published code expects are included.
    """
    copies = {
        name: view.cpu().clone(memory_format=torch.contiguous_format)
        for name, view in published_parameters(model).items()
    }
    return copies | published_buffers(model.config)


def published_parameters(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Return views of all parameters of a whole model by published name. They share its memory."""
    views = {}
    for name, target in _targets(model):
        assert target.view is not None and tuple(target.view.shape) == target.shape, f"{name}: experts are missing"
        views[name] = target.view
    return views


class _Target(NamedTuple):
    """Where a published tensor of `shape` goes: into `view` of `parameter` (None: an expert that the model does not hold).

    `ids` are the rows of the tensor that the model holds (None: all).
    """

    parameter: str
    shape: tuple[int, ...]
    view: Tensor | None
    ids: tuple[int, ...] | None


def _targets(model: DiffusionTransformer) -> Iterator[tuple[str, _Target]]:
    """Yield each published name of the model with all its experts, and its target."""
    config = model.config
    for name, parameter in model.named_parameters():
        owner, shape = model.get_submodule(name.rpartition(".")[0]), tuple(parameter.shape)
        if not isinstance(owner, Experts):
            yield name, _Target(name, shape, parameter.detach(), None)
        elif published_expert_name(name, 0) is None:
            yield name, _Target(name, (config.experts.count, *shape[1:]), parameter.detach(), owner.ids)
        else:
            assert config.moe is not None
            rows = {
                expert: row.mT if row.dim() == 2 else row
                for expert, row in zip(owner.ids, parameter.detach(), strict=True)
            }
            for expert in range(config.moe.experts):
                published = published_expert_name(name, expert)
                assert published is not None
                yield published, _Target(name, shape[:0:-1], rows.get(expert), None)


def published_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Return the fixed buffers that published code expects, by name. They depend only on the config."""
    buffers = fixed_tables(config)
    if config.variant == "switch":
        buffers[TASKS] = torch.arange(config.timesteps)
        buffers[PRIOR_MASK] = _float_mask(expert_windows(config))
    if config.variant == "dtr":
        buffers |= {f"routers.{i}._unit_mapping": _float_mask(channel_windows(config)) for i in range(config.depth)}
    return buffers


def fixed_tables(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tables of positions that the model adds (1, L, D) or turns heads by (L, d), float32, by published name."""
    tables = {}
    if config.positions == "sincos":
        tables[POSITIONS] = grid_positions(config.side, config.width, config.position_base)
    if config.rope:
        tables |= dict(zip(ROPE, rope_tables(config.side, config.head_width, config.position_base), strict=True))
    return tables


def _summary(config: ModelConfig) -> str:
    experts = f", {config.experts.count} {config.experts.kind} experts" if config.variant == "switch" else ""
    if config.moe is not None:
        experts += f", {config.moe.experts} {config.moe.kind} experts of tokens"
    return f"variant {config.variant}, depth {config.depth}, width {config.width}{experts}, classes {config.classes}"


def _is_buffer(name: str) -> bool:
    return name in (POSITIONS, *ROPE, PRIOR_MASK, TASKS) or CHANNEL_MASK.fullmatch(name) is not None


def _misfit(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    """Return the problem of a published tensor, or an empty string."""
    if not tensor.is_floating_point():
        return f"{name} has dtype {tensor.dtype}, not a float"
    return "" if tuple(tensor.shape) == shape else f"{name} has shape {tuple(tensor.shape)}, not {shape}"


def _float_mask(windows: TaskWindows) -> Tensor:
    return torch.from_numpy(windows.mask).float()


def _check_buffers(config: ModelConfig, given: Mapping[str, Tensor]) -> None:
    """Check that the fixed buffers of the checkpoint are those of the config.

    Raises: ConfigError: if they differ, because the checkpoint then computes another function.
    """
    tables = fixed_tables(config)
    for name in (POSITIONS, *ROPE):
        if name in given:
            _check_table(config, name, given[name].cpu(), tables.get(name))
    active = _active_units(given.get(PRIOR_MASK))
    if config.variant == "switch" and active and active != config.depth * config.experts.top_k:
        ours, theirs = config.experts.top_k, active // config.depth
        raise ConfigError(f"model.experts.top_k: {ours} is not the checkpoint's; legal: {theirs}")
    for name in filter(CHANNEL_MASK.fullmatch, given if config.variant == "dtr" else ()):
        mask = _float_mask(channel_windows(config))
        if _active_units(given[name]) and not torch.equal(given[name].cpu().float(), mask):
            values = f"alpha {config.dtr.alpha}, beta {config.dtr.beta}"
            raise ConfigError(f"model.dtr: {values} do not give the checkpoint's {name}")


def _check_table(config: ModelConfig, name: str, theirs: Tensor, ours: Tensor | None) -> None:
    """Check a table of positions in the checkpoint. `ours` is None if the config has no such table. Raises: ConfigError."""
    if ours is None:
        key, legal = ("positions: none", "sincos") if name == POSITIONS else ("rope: false", "true")
        raise ConfigError(f"model.{key}, but the checkpoint was trained with {name}; legal: {legal}")
    if theirs.shape != ours.shape:
        key = "heads" if name in ROPE and theirs.shape[:1] == ours.shape[:1] else "input_size"
        raise ConfigError(f"model.{key}: {name} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
    if not theirs.is_floating_point():
        raise ConfigError(f"model: {name} has dtype {theirs.dtype}, not a float")
    tolerance = table_tolerance(name, config.side, theirs.dtype)
    if not torch.allclose(theirs.float(), ours, rtol=0, atol=tolerance):
        base = f" of model.position_base {config.position_base}" if config.position_base else ""
        raise ConfigError(f"model: {name} differs from the fixed sin-cos positions{base} by more than {tolerance:.1e}")


def table_tolerance(name: str, side: int, dtype: torch.dtype) -> float:
    """Return the largest error of a published table of positions of a grid of `side` patches."""
    # |value| <= 1, so eps bounds its rounding error. Published code rounds the frequency (to float32: 2 eps) and the angle.
    angle_error = 4 * torch.finfo(torch.float32).eps * side if name in ROPE else 0.0
    return max(1e-5, angle_error, torch.finfo(dtype).eps)


def _active_units(mask: Tensor | None) -> int:
    """Return the number of units that each task of a published mask uses, or 0 if the tensor is not such a mask."""
    if mask is None or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return 0
    counts = mask.sum(1).unique()
    return int(counts) if len(counts) == 1 else 0
