"""The configs, DeepSpeed JSONs and hardware files that come with sdit, found by name.

They are the files of the repository's folder `configs`. `sdit/presets` is a link to it, so that a checkout, an editable
installation, a frozen work tree and a wheel (which holds copies) all read them at the same place next to this code.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "presets"
CONFIGS, DEEPSPEED, HARDWARE = "*.yaml", "deepspeed/*.json", "hardware/*.yaml"
DEFAULT_CONFIG, DEFAULT_DEEPSPEED, DEFAULT_HARDWARE = "digits", "zero1", "h100-ib"


def presets(pattern: str) -> dict[str, Path]:
    """Return name -> file of the presets that match `pattern`, which is CONFIGS, DEEPSPEED or HARDWARE, in the order of names."""
    return {path.stem: path.resolve() for path in sorted(FOLDER.glob(pattern))}


def config_file(text: str) -> Path:
    """An argument's type: return the path of a YAML config that was given as a path or as the name of a preset.

    Raises: argparse.ArgumentTypeError: if there is no such preset.
    """
    return Path(_given_or_preset(text, CONFIGS))


def deepspeed_file(text: str) -> str:
    """An argument's type: the same as `config_file` for a DeepSpeed JSON. Empty text stays empty."""
    return text and _given_or_preset(text, DEEPSPEED)


def hardware_file(text: str) -> Path:
    """An argument's type: the same as `config_file` for a hardware file."""
    return Path(_given_or_preset(text, HARDWARE))


def preset_file(name: str) -> Path:
    """An argument's type: return the file of a preset of any kind.

    Raises: argparse.ArgumentTypeError: if there is no such preset.
    """
    return _find(name, presets(CONFIGS) | presets(DEEPSPEED) | presets(HARDWARE))


def _given_or_preset(text: str, pattern: str) -> str:
    """Return `text` if it is a path: it has a slash or the ending of such files. Otherwise return the path of the preset.

    Raises: argparse.ArgumentTypeError: if it is neither a path nor a preset.
    """
    endings = (".json",) if pattern == DEEPSPEED else (".yaml", ".yml")
    if "/" in text or text.endswith(endings):
        return text
    return str(_find(text, presets(pattern), f", or a path with a slash or the ending {endings[0]}"))


def _find(name: str, known: Mapping[str, Path], otherwise: str = "") -> Path:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise argparse.ArgumentTypeError(f"{name!r} is not a preset; {hint}legal: {', '.join(known)}{otherwise}")
