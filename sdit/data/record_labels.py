"""Labels of records in archives that others made: numbers, or texts that become classes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sdit.data.names import shown
from sdit.errors import ConfigError, DataError

NO_LABEL = -1  # of a record that cannot be used
MOST_CLASSES = 100_000  # more different texts are captions, not classes
MOST_NAME_BYTES = 16 * 2**20
ClassNames = tuple[str, ...]
_NUMBER = re.compile(r"[0-9]{1,9}")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def as_label(value: Any) -> int | str | None:
    """Return a value of a JSON file or of a table as a label. Return None if it is none, such as -1 or an empty text."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, int):
        return value if 0 <= value < 10**9 else None
    text = value.strip()
    is_other_number = _INTEGER.fullmatch(text) and not _NUMBER.fullmatch(text)
    return None if is_other_number else text or None


@dataclass(frozen=True)
class LabelColumn:
    """The labels (n,) int64 of an archive: numbers, or positions in `texts`. NO_LABEL: the record has none.

    `texts` are the different texts, in any order. `names` are the class names that the archive itself states. `has_labels`
    is False if the archive is read without labels.
    """

    values: np.ndarray
    texts: ClassNames = ()
    names: ClassNames = ()
    has_labels: bool = True


def _is_text(label: int | str | None) -> TypeGuard[str]:
    return isinstance(label, str) and not _NUMBER.fullmatch(label)


def odd_labels(labels: Sequence[int | str | None]) -> dict[int, str]:
    """Return why labels cannot be used, by position: they are texts, and most labels of the archive are numbers."""
    texts = {position: label for position, label in enumerate(labels) if _is_text(label)}
    numbers = sum(label is not None for label in labels) - len(texts)
    if len(texts) >= numbers:
        return {}
    reason = "but most labels of the file are numbers"
    return {position: f"has the label {shown(repr(text)[:40])}, {reason}" for position, text in texts.items()}


def label_column(
    labels: Sequence[int | str | None], where: Path, names: ClassNames = (), has_labels: bool = True
) -> LabelColumn:
    """Return the labels of an archive's records, each a number, a text, or None. Texts of digits are numbers.

    The labels that `odd_labels` returns count as None.

    Raises: DataError: if some labels are numbers and at least as many are texts.
    """
    values = np.full(len(labels), NO_LABEL, dtype=np.int64)
    texts: dict[str, int] = {}
    numbers, odd = 0, odd_labels(labels)
    for position, label in enumerate(labels):
        if label is None or position in odd:
            continue
        if _is_text(label):
            values[position] = texts.setdefault(label, len(texts))
        else:
            values[position] = int(label)
            numbers += 1
    if texts and numbers:
        raise DataError(
            f"{shown(where)}: some labels are numbers and others are texts such as {shown(next(iter(texts)))!r}; "
            "legal: only numbers, or only texts"
        )
    return LabelColumn(values, tuple(texts), names, has_labels)


def merged_labels(columns: Sequence[LabelColumn], given: ClassNames) -> tuple[np.ndarray, ClassNames, int]:
    """Return the label (N,) int64 of each record of all archives, the class names, and the number of classes.

    Texts are numbered in the order of the class names, or sorted if there are no names. `given` replaces the names that
    the archives state.

    Raises:
        DataError: if the archives do not agree, or no record has a label.
        ConfigError: if a label has no name.
    """
    if not all(column.has_labels for column in columns):
        return np.zeros(sum(len(column.values) for column in columns), dtype=np.int64), (), 0
    stated = {column.names for column in columns if column.names}
    if len(stated) > 1 and not given:
        raise DataError("the archives state different class names; legal: --class-names FILE")
    names = given or next(iter(stated), ())
    used = [column for column in columns if (column.values != NO_LABEL).any()]
    if not used:
        raise DataError("no record has a label; legal: another --label or --label-key, or --unlabelled")
    if len({bool(column.texts) for column in used}) > 1:
        raise DataError("labels are numbers in some archives and texts in others; legal: only numbers, or only texts")
    if used[0].texts:
        return _numbered_texts(columns, names)
    labels = np.concatenate([column.values for column in columns])
    if labels.max() >= MOST_CLASSES:
        raise DataError(f"labels: {labels.max()} occurs; legal: 0..{MOST_CLASSES - 1}, or --unlabelled")
    if names and labels.max() >= len(names):
        raise ConfigError(f"--class-names: {len(names)} names, but label {labels.max()} occurs; legal: a name for each")
    return labels, names, len(names) or int(labels.max()) + 1


def _numbered_texts(columns: Sequence[LabelColumn], names: ClassNames) -> tuple[np.ndarray, ClassNames, int]:
    texts = sorted(set().union(*(column.texts for column in columns)))
    if len(texts) > MOST_CLASSES:
        raise DataError(f"labels: {len(texts)} different texts; legal: up to {MOST_CLASSES}, or --unlabelled")
    label_of = {name: label for label, name in enumerate(names or texts)}
    unknown = [text for text in texts if text not in label_of]
    if unknown:
        raise ConfigError(
            f"--class-names: has no {shown(unknown[0])!r}, which is a label; legal: a name for each label"
        )
    found = []
    for column in columns:
        table = np.array([*(label_of[text] for text in column.texts), NO_LABEL], dtype=np.int64)
        found.append(table[column.values])  # NO_LABEL is the last entry
    return np.concatenate(found), names or tuple(texts), len(label_of)


def read_class_names(path: Path) -> ClassNames:
    """Return the class names in a file: a name on each line, a JSON list, or a JSON object of names by number.

    In a JSON object a value may be a list, as in Keras's imagenet_class_index.json; its last element is the name.

    Raises: ConfigError: if the file cannot be read, has no names or has a name twice.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_NAME_BYTES).decode("utf-8")
        names = _json_names(json.loads(text)) if path.suffix == ".json" else tuple(text.splitlines())
    except OSError as error:
        raise ConfigError(f"--class-names: {shown(path)}: {error.strerror}; legal: a text or JSON file") from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ConfigError(
            f"--class-names: {shown(path)}: cannot be read; legal: a name on each line, or .json with a list, or with an "
            "object of names by number 0, 1, ..."
        ) from None
    blank = next((number for number, name in enumerate(names) if not name.strip()), None)
    if not names or blank is not None:
        raise ConfigError(f"--class-names: {shown(path)}: label {blank or 0} has no name; legal: a name for each label")
    return names


def _json_names(value: Any) -> ClassNames:
    if isinstance(value, dict):
        value = [value[str(number)] for number in range(len(value))]
    if not isinstance(value, list):
        raise ValueError("neither a list nor an object")
    names = [name[-1] if isinstance(name, list) else name for name in value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is no text")
    return tuple(names)
