"""Converts published DiT, DTR and Switch-DiT weights to sdit's models and back. T tasks, M experts of a block, D width."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdit.checked_files import open_regular
from sdit.config import ModelConfig
from sdit.errors import CheckpointError, ConfigError
from sdit.files import replacing_path
from sdit.model.dit import DiffusionTransformer
from sdit.model.embedding import grid_positions
from sdit.model.moe.base import Experts
from sdit.model.windows import TaskWindows, channel_windows, expert_windows
from sdit.pickles import load_tensors
from sdit.safetensors_file import read_header

Values = TypeVar("Values")
POSITIONS = "pos_embed"
PRIOR_MASK = "prior._unit_mapping"
TASKS = "full_time"
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # of files that are read
WRITTEN_SUFFIXES = SUFFIXES[:3]
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
EMA_HOLDERS = frozenset(("ema", "ema_model", "model_ema", "ema_net", "averaged_model"))
HOLDERS = EMA_HOLDERS | {"model", "net", "network", "denoiser", "diffusion_model", "transformer"}
STATES = {  # keys under which training code stores a kind of weights
    "ema": (*sorted(EMA_HOLDERS), "ema_state_dict", "state_dict_ema"),
    "model": ("model", "model_state_dict", "module"),
}
CHANNEL_MASK = re.compile(r"routers\.\d+\._unit_mapping")


_log = logging.getLogger(__name__)


@torch.no_grad()
def load_published(model: DiffusionTransformer, mapping: Mapping[str, Tensor | np.ndarray]) -> None:
    """Copy published weights (tensors or arrays) of any float dtype into the model.

    The model may hold a subset of the M experts.

    Raises: ConfigError: if names, shapes or fixed buffers do not fit the model's config. Nothing is copied then.
    """
    try:
        given = {name: torch.as_tensor(values) for name, values in published_names(mapping, "ema").items()}
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    wanted = dict(model.named_parameters())
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not _is_buffer(name)]
    if missing or unexpected:
        problems = [
            f"{kind} {_listed(names)}"
            for kind, names in (("does not contain", missing), ("also has", unexpected))
            if names
        ]
        raise ConfigError(
            f"model: the checkpoint {' and '.join(problems)}; legal: the names of {_summary(model.config)}"
        )
    misfits = [text for name in wanted if (text := _misfit(name, given[name], _full_shape(model, name)))]
    if misfits:
        raise ConfigError(f"model: {_listed(misfits)}; legal: the shapes of {_summary(model.config)}")
    _check_buffers(model.config, given)
    for name, parameter in wanted.items():
        ids = _expert_ids(model, name)
        parameter.copy_(given[name] if ids is None else given[name][list(ids)])


@torch.no_grad()
def to_published(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Return CPU copies of all weights with their published names.

    The fixed buffers that published code expects are included.
    """
    config = model.config
    assert all(len(module.ids) == config.experts.count for module in model.modules() if isinstance(module, Experts))
    published = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    return published | published_buffers(config)


def published_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Return the fixed buffers that published code expects, by name. They depend only on the config."""
    buffers = {POSITIONS: _positions(config)}
    if config.variant == "switch":
        buffers[TASKS] = torch.arange(config.timesteps)
        buffers[PRIOR_MASK] = _float_mask(expert_windows(config))
    if config.variant == "dtr":
        buffers |= {f"routers.{i}._unit_mapping": _float_mask(channel_windows(config)) for i in range(config.depth)}
    return buffers


def read_published_file(path: str | Path, weights: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
    """Return tensors by published name from a .safetensors file or a file of torch.save. No code in the file is run.

    In a file of torch.save, the tensors are at the top level or under a key such as `ema`, `model` or `state_dict`. Wrapper
    names of torch.compile, DDP and FSDP are removed.

    Raises: CheckpointError: if the file cannot be read or holds no such weights. The message names the file.
    """
    path = Path(path)
    _check_file(path)
    try:
        payload = load_file(path) if _suffix(path, SUFFIXES) == ".safetensors" else load_tensors(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise any error in the readers
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from None
    state = _find_state(payload, weights)
    if state is None:
        if isinstance(payload, dict) and not any(key in payload for key in (*STATES[weights], "state_dict")):
            raise CheckpointError(f"{path}: holds no {weights!r}; it holds {_listed(map(str, payload))}")
        raise CheckpointError(f"{path}: {weights!r} is not a mapping of names to tensors")
    bad = [str(name) for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        raise CheckpointError(f"{path}: {_listed(bad)} hold{'s' * (len(bad) == 1)} NaN or infinite numbers")
    try:
        return {name: Tensor.detach(tensor) for name, tensor in published_names(state, weights).items()}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def published_names(mapping: Mapping[str, Values], weights: Literal["ema", "model"]) -> dict[str, Values]:
    """Return the values of one model by published name, without wrappers and holders such as `model.`.

    If a mapping holds an averaged model and another one, as Lightning's `state_dict` does, `weights` selects one. If a model
    has a holder, values without one belong to other modules and are ignored.

    Raises: ValueError: if two values have the same name.
    """
    split = {name: _split_name(name) for name in mapping}
    if any(holders for holders, _ in split.values()):
        averaged = {name for name, (holders, _) in split.items() if EMA_HOLDERS & set(holders)}
        others = {name for name, (holders, _) in split.items() if holders} - averaged
        chosen = averaged if averaged and (weights == "ema" or not others) else others
        ignored = [name for name, (holders, _) in split.items() if not holders]
        if ignored:
            _log.info("ignored the weights of other modules: %s", _listed(ignored))
        split = {name: split[name] for name in mapping if name in chosen}
    found: dict[str, Values] = {}
    origins: dict[str, str] = {}
    for name, (_, published) in split.items():
        if published in found:
            raise ValueError(f"{origins[published]} and {name} are both {published}; legal: one model in a file")
        found[published], origins[published] = mapping[name], name
    return found


def _split_name(name: str) -> tuple[tuple[str, ...], str]:
    """Return the holders before a parameter's name, and the name without holders and wrappers."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    first = next((position for position, word in enumerate(words) if word not in HOLDERS), len(words))
    return tuple(words[:first]), ".".join(words[first:])


def _find_state(payload: Any, weights: Literal["ema", "model"]) -> dict[str, Tensor] | None:
    """Return the mapping of names to tensors in the content of a file, or None if there is none."""
    if not isinstance(payload, dict):
        return None
    tensors = {str(name): value for name, value in payload.items() if isinstance(value, Tensor)}
    if tensors and not any(isinstance(value, dict) for value in payload.values()):
        return tensors
    for key in (*STATES[weights], "state_dict"):
        if isinstance(payload.get(key), dict):
            inner = payload[key]
            return _find_state(inner, weights) or _find_state(inner, "model")
    return None


def write_published_file(path: str | Path, mapping: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, or a .pt file with the same tensors under `ema` and `model`, atomically.

    Raises: CheckpointError: if the file cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in mapping.items()}
    suffix = _suffix(path, WRITTEN_SUFFIXES)
    try:
        with replacing_path(path) as partial:
            if suffix == ".safetensors":
                save_file(tensors, partial, metadata=dict(metadata))
            else:
                torch.save({"model": tensors, "ema": tensors, "metadata": dict(metadata)}, partial)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _suffix(path: Path, legal: Sequence[str]) -> str:
    if path.suffix not in legal:
        raise CheckpointError(f"{path}: unknown file type {path.suffix!r}; legal: {', '.join(legal)}")
    return path.suffix


def _check_file(path: Path) -> None:
    """Check that the path is a regular file and, for .safetensors, that its header is valid.

    Raises: CheckpointError: if it is not.
    """
    try:
        with open_regular(path):
            pass
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".safetensors":
        read_header(path)


def _reason(error: Exception) -> str:
    """Return an error in one line. torch's message about refused code is replaced, because it advises to run the code."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).split("\n", 1)[0]
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return f"it holds code or objects ({refused[1]}), only tensors are legal" if refused else "it is not a tensor file"


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    """Return True if all numbers of a tensor are finite. One-byte floats are converted to float32 for the test."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _summary(config: ModelConfig) -> str:
    experts = f", {config.experts.count} {config.experts.kind} experts" if config.variant == "switch" else ""
    return f"variant {config.variant}, depth {config.depth}, width {config.width}{experts}, classes {config.classes}"


def _is_buffer(name: str) -> bool:
    return name in (POSITIONS, PRIOR_MASK, TASKS) or CHANNEL_MASK.fullmatch(name) is not None


def _expert_ids(model: DiffusionTransformer, name: str) -> tuple[int, ...] | None:
    """Return the ids of the experts in the rows of a parameter, or None if its rows are not experts."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.ids if isinstance(owner, Experts) else None


def _full_shape(model: DiffusionTransformer, name: str) -> tuple[int, ...]:
    """Return the shape of the parameter with all M experts."""
    shape = tuple(model.get_parameter(name).shape)
    return shape if _expert_ids(model, name) is None else (model.config.experts.count, *shape[1:])


def _misfit(name: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    """Return the problem of a published tensor, or an empty string."""
    if not tensor.is_floating_point():
        return f"{name} has dtype {tensor.dtype}, not a float"
    return "" if tuple(tensor.shape) == shape else f"{name} has shape {tuple(tensor.shape)}, not {shape}"


def _positions(config: ModelConfig) -> Tensor:
    return grid_positions(config.input_size // config.patch_size, config.width)


def _float_mask(windows: TaskWindows) -> Tensor:
    return torch.from_numpy(windows.mask).float()


def _check_buffers(config: ModelConfig, given: Mapping[str, Tensor]) -> None:
    """Check that the fixed buffers of the checkpoint are those of the config.

    Raises: ConfigError: if they differ, because the checkpoint then computes another function.
    """
    if POSITIONS in given:
        ours, theirs = _positions(config), given[POSITIONS].cpu()
        if theirs.shape != ours.shape:
            raise ConfigError(f"model.input_size: {POSITIONS} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        tolerance = max(1e-5, torch.finfo(theirs.dtype).eps)  # |position| <= 1, so eps bounds the rounding error
        if not torch.allclose(theirs.float(), ours, rtol=0, atol=tolerance):
            raise ConfigError(
                f"model: {POSITIONS} differs from the fixed sin-cos positions by more than {tolerance:.1e}"
            )
    active = _active_units(given.get(PRIOR_MASK))
    if config.variant == "switch" and active and active != config.depth * config.experts.top_k:
        raise ConfigError(
            f"model.experts.top_k: {config.experts.top_k} is not the checkpoint's; legal: {active // config.depth}"
        )
    for name in filter(CHANNEL_MASK.fullmatch, given if config.variant == "dtr" else ()):
        if _active_units(given[name]) and not torch.equal(
            given[name].cpu().float(), _float_mask(channel_windows(config))
        ):
            raise ConfigError(
                f"model.dtr: alpha {config.dtr.alpha}, beta {config.dtr.beta} do not give the checkpoint's {name}"
            )


def _active_units(mask: Tensor | None) -> int:
    """Return the number of units that each task of a published mask uses, or 0 if the tensor is not such a mask."""
    if mask is None or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return 0
    counts = mask.sum(1).unique()
    return int(counts) if len(counts) == 1 else 0
