"""The names of published weights, without the wrappers and holders that training code adds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

Values = TypeVar("Values")
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
EMA_HOLDERS = frozenset(("ema", "ema_model", "model_ema", "ema_net", "averaged_model"))
HOLDERS = EMA_HOLDERS | {"model", "net", "network", "denoiser", "diffusion_model", "transformer"}
MOST_NAMES = 6  # of a message

_log = logging.getLogger(__name__)


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
            _log.info("ignored the weights of other modules: %s", listed(ignored))
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


def listed(names: Iterable[str]) -> str:
    """Return the first names and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
