"""Files that a user names by path, by folder, or by a pattern such as train-{0000..1023}.tar or train-*.tar."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand  # type: ignore[import-untyped]

from sdit.data.names import shown
from sdit.data.tree import SPLITS
from sdit.errors import ConfigError

MOST_FILES = 1_000_000
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?=[-_.])", re.IGNORECASE)


def matching_files(patterns: Sequence[str], suffixes: Sequence[str], option: str) -> list[Path]:
    """Return the files in the order in which they are named; those of a folder or of `*` are sorted by name.

    Of a folder, the files with one of the `suffixes` are meant.

    Raises: ConfigError: if a pattern matches no file, names a file twice, or a folder holds several splits. The message
        names `option`.
    """
    found = [path for pattern in patterns for path in _matches(pattern, suffixes, option)]
    for path, count in Counter(found).items():
        if count > 1:
            raise ConfigError(f"{option}: {shown(path)} is named twice; legal: each file once")
    return found


def _matches(pattern: str, suffixes: Sequence[str], option: str) -> list[Path]:
    if os.path.isdir(pattern):
        return _folder(Path(pattern), suffixes, option)
    if os.path.exists(pattern):
        return [Path(pattern)]
    try:
        expanded = list(islice(braceexpand(pattern), MOST_FILES + 1))
    except ValueError:
        raise ConfigError(f"{option}: {shown(pattern)} has unbalanced braces; legal: {{0000..1023}}") from None
    if len(expanded) > MOST_FILES:
        raise ConfigError(f"{option}: {shown(pattern)} names more than {MOST_FILES} files")
    found: list[Path] = []
    for each in expanded:
        files = sorted(glob.glob(each)) if glob.has_magic(each) else [each] if os.path.exists(each) else []
        if not files:
            count = f" (1 of {len(expanded)} of {shown(pattern)})" if len(expanded) > 1 else ""
            raise ConfigError(f"{option}: {shown(each)}: no such file{count}; legal: files, a folder, or a pattern")
        found += map(Path, files)
    return found


def _folder(folder: Path, suffixes: Sequence[str], option: str) -> list[Path]:
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names if not name.startswith("."))
    files = sorted(path for path in paths if path.name.lower().endswith(tuple(suffixes)))
    if not files:
        raise ConfigError(f"{option}: {shown(folder)} holds no file that ends in {' or '.join(suffixes)}")
    splits = sorted({match[1] for path in files if (match := _SPLIT.match(path.name))})
    if len(splits) > 1:
        pattern = f"{folder}/{splits[0]}-*{files[0].suffix}"
        raise ConfigError(
            f"{option}: {shown(folder)} holds several splits ({', '.join(splits)}); legal: a pattern such as {shown(pattern)}"
        )
    return files
