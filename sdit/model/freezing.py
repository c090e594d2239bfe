"""Parameters that a run does not train: they have no gradient, no optimizer state, and no average of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from sdit.errors import ConfigError
from sdit.model.dit import DiffusionTransformer


def freeze(model: DiffusionTransformer, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names fit one of the `patterns` of `train.freeze`.

    Raises: ConfigError: if a pattern fits no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(
                f"train.freeze: {pattern!r} fits no parameter; legal: patterns of {', '.join(_families(parameters))}"
            )
        for name in fitting:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze: {list(patterns)} leaves no parameter to train; legal: fewer patterns")


def _families(names: Iterable[str]) -> list[str]:
    """Return the names without repetition, with `*` for the number of a block."""
    return sorted({re.sub(r"\.\d+\.(?=.*\.)", ".*.", name, count=1) for name in names})
