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

    Text with a slash, or that ends in .yaml or .yml, is a path.

    Raises:
        argparse.ArgumentTypeError: it is neither a path nor a preset.
    """
    if "/" in text or text.endswith((".yaml", ".yml")):
        return Path(text)
    return _find(text, presets(CONFIGS), ", or a path with a slash or the ending .yaml")


def deepspeed_file(text: str) -> str:
    """An argument's type: return the path of a DeepSpeed JSON that was given as a path or as the name of a preset.

    Text with a slash, or that ends in .json, is a path. Empty text stays empty.

    Raises:
        argparse.ArgumentTypeError: it is neither a path nor a preset.
    """
    if not text or "/" in text or text.endswith(".json"):
        return text
    return str(_find(text, presets(DEEPSPEED), ", or a path with a slash or the ending .json"))


def hardware_file(text: str) -> Path:
    """An argument's type: return the path of a hardware file that was given as a path or as the name of a preset.

    Text with a slash, or that ends in .yaml or .yml, is a path.

    Raises:
        argparse.ArgumentTypeError: it is neither a path nor a preset.
    """
    if "/" in text or text.endswith((".yaml", ".yml")):
        return Path(text)
    return _find(text, presets(HARDWARE), ", or a path with a slash or the ending .yaml")


def preset_file(name: str) -> Path:
    """An argument's type: return the file of a preset of any kind.

    Raises:
        argparse.ArgumentTypeError: there is no such preset.
    """
    return _find(name, presets(CONFIGS) | presets(DEEPSPEED) | presets(HARDWARE))


def _find(name: str, known: Mapping[str, Path], otherwise: str = "") -> Path:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise argparse.ArgumentTypeError(f"{name!r} is not a preset; {hint}legal: {', '.join(known)}{otherwise}")
