"""Classes of a data set: their number, their names, and the labels that users give by number or by name."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from sdit.errors import ConfigError

SHOWN = 3  # names in a message; the others are only counted
LABEL_SYNTAX = "labels such as 0,3,5-7 or class names such as Trouser,Bag"

_NUMBERS = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_HALF_RANGE = re.compile(r"[0-9]*-[0-9]*")
_ITEM = re.compile(r'\s*(?:((?:name:|label:)?)"((?:[^"]|"")*)"\s*|([^,]*))(?:,|$)')


@dataclass(frozen=True)
class Classes:
    """The labels 0..count-1 and their names. `names` is empty if the names are unknown.

    If `count` is 0, the data have no labels. No image has a label in `empty`.
    """

    count: int
    names: tuple[str, ...] = ()
    empty: tuple[int, ...] = ()

    @property
    def labels(self) -> list[int]:
        """The labels that at least one image has, in ascending order."""
        return [label for label in range(self.count) if label not in self.empty]

    def describe(self, label: int) -> str:
        """Return `3 (Dress)`, or `3` if the name is unknown or equals the number."""
        name = self.names[label] if label < len(self.names) else str(label)
        return str(label) if name == str(label) else f"{label} ({name})"

    def describe_all(self, labels: Sequence[int]) -> str:
        """Return the different labels in their order, as `1 (cat), 0 (dog)`."""
        return ", ".join(map(self.describe, dict.fromkeys(labels)))

    def labels_named(self, name: str) -> list[int]:
        """Return the labels with a given name: none, one, or several if the data repeat the name.

        Names are compared in Unicode's normal form C, so the two spellings of é are equal.
        """
        return self._labels_by_name.get(_normal(name), [])

    def labels_with_synonym(self, name: str) -> list[int]:
        """Return the labels of which `name` is a synonym: `tabby cat` is one of the class `tabby, tabby cat`."""
        return self._labels_by_synonym.get(_normal(name), [])

    @cached_property
    def _labels_by_name(self) -> dict[str, list[int]]:
        return _by_name([name] for name in self.names)

    @cached_property
    def _labels_by_synonym(self) -> dict[str, list[int]]:
        return _by_name([part.strip() for part in name.split(",")] for name in self.names)


def _by_name(names: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Return the labels that have a name, by name. `names` holds the names of each label."""
    found: dict[str, list[int]] = {}
    for label, each in enumerate(names):
        for name in dict.fromkeys(map(_normal, each)):
            found.setdefault(name, []).append(label)
    return found


def class_differences(here: Classes, there: Classes, ordered: bool = True) -> str:
    """Return how the classes `here` differ from the classes `there`. Return an empty string if no difference is known.

    Unknown names are not compared, and neither are unlabelled data. If `ordered` is False, the order is not compared.
    """
    if not here.count or not there.count:
        return ""
    differences = [f"{here.count} classes, not {there.count}"] if here.count != there.count else []
    if here.names and there.names:
        mine, theirs = [_normal(name) for name in here.names], [_normal(name) for name in there.names]
        known, wanted = set(mine), set(theirs)
        if more := [name for name in mine if name not in wanted]:
            differences.append(f"it also has {_listed(more)}")
        if less := [name for name in theirs if name not in known]:
            differences.append(f"it has no {_listed(less)}")
        if ordered and not differences and mine != theirs:
            label = next(label for label, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
            differences.append(f"another order: label {label} is {mine[label]!r}, not {theirs[label]!r}")
    return "; ".join(differences)


def check_label_syntax(text: str) -> None:
    """Check the syntax of a list of labels. The classes are not needed.

    Raises: ConfigError: if the text is not a list of labels for any classes.
    """
    for prefix, item, quoted in _items(text):
        _check_item(prefix, item, quoted, text)


def choose_labels(given: str | int | Sequence[str | int], classes: Classes, key: str) -> list[int]:
    """Return the labels that a user gives by number, by range or by class name.

    A text holds items between commas: `3`, `5-7`, `Trouser`, `"tench, Tinca tinca"`. In a sequence each element is one
    item. `name:10` and `"10"` mean the class that is called 10. `label:10` means label 10. A plain `10` means label 10
    and is refused if another label is called 10. If the whole text is a class name, it means that class. A name that no
    class has means the class of which it is a synonym: `tabby cat` means `tabby, tabby cat`.

    Raises: ConfigError: if an item is not a label or a class name, or is ambiguous. The message names `key`.
    """
    if not classes.count:
        raise ConfigError(f"{key}: {_shown(given)}, but the model is unconditional; legal: no labels")
    if not isinstance(given, str):
        elements = [given] if isinstance(given, int) else given
        labels = [label for element in elements for label in _element_labels(str(element), classes, key)]
    else:
        labels = _text_labels(given, classes, key)
    if not labels:
        raise ConfigError(f"{key}: is empty; legal: {LABEL_SYNTAX}")
    untrained = [label for label in labels if label in classes.empty]
    if untrained:
        raise ConfigError(f"{key}: label {classes.describe(untrained[0])} has no image in the data; legal: the others")
    return labels


def _text_labels(text: str, classes: Classes, key: str) -> list[int]:
    whole = classes.labels_named(text.strip()) if "," in text else []
    try:
        labels = [label for item in _items(text) for label in _item_labels(*item, classes, key)]
    except ConfigError:
        if len(whole) == 1:
            return whole
        raise
    if whole and set(labels) == set(whole):
        return whole
    if whole:
        raise ConfigError(f'{key}: {text!r} is a class and also a list of classes; legal: "{text}" in double quotes')
    return labels


def _element_labels(element: str, classes: Classes, key: str) -> Sequence[int]:
    """Return the labels of one element of a YAML list. A comma does not separate items here."""
    prefix, item = _prefixed(element)
    return _item_labels(prefix, item.strip(), False, classes, key)


def _prefixed(text: str) -> tuple[str, str]:
    """Return `name:`, `label:` or an empty string, and the rest of the text."""
    prefix = next((word for word in ("name:", "label:") if text.startswith(word)), "")
    return prefix, text.removeprefix(prefix)


def _items(text: str) -> list[tuple[str, str, bool]]:
    """Return (`name:`, `label:` or an empty string; item; True if it was quoted) for each item between commas."""
    items, position = [], 0
    while position <= len(text):
        match = _ITEM.match(text, position)
        assert match is not None  # the last alternative matches any text up to the next comma
        if match[2] is not None:
            items.append((match[1], match[2].replace('""', '"'), True))
        else:
            items.append((*_prefixed(match[3].strip()), False))
        position = match.end() if match[0].endswith(",") else len(text) + 1
    return items


def _check_item(prefix: str, item: str, quoted: bool, text: str) -> None:
    numbers = _NUMBERS.fullmatch(item)
    is_reversed = numbers is not None and numbers[2] is not None and int(numbers[1]) > int(numbers[2])
    is_half = numbers is None and _HALF_RANGE.fullmatch(item) is not None
    is_number_wanted = prefix == "label:" and (numbers is None or quoted)
    is_plain = not quoted and prefix != "name:"
    if not item or (is_plain and (item.startswith('"') or is_reversed or is_half)) or is_number_wanted:
        raise ConfigError(f"{text!r} is no list of labels; legal: {LABEL_SYNTAX}")


def _item_labels(prefix: str, item: str, quoted: bool, classes: Classes, key: str) -> Sequence[int]:
    try:
        _check_item(prefix, item, quoted, item)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    numbers = None if quoted or prefix == "name:" else _NUMBERS.fullmatch(item)
    named = [] if prefix == "label:" else classes.labels_named(item)
    if numbers is None:
        return _named_label(item, named, classes, key)
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if last >= classes.count:
        raise ConfigError(f"{key}: {last} is no class of the data; legal: {_legal(classes)}")
    if not prefix:
        _check_unambiguous(item, range(first, last + 1), named, classes, key)
    return range(first, last + 1)


def _named_label(name: str, labels: list[int], classes: Classes, key: str) -> list[int]:
    labels = labels or classes.labels_with_synonym(name)
    if len(labels) == 1:
        return labels
    if labels:
        raise ConfigError(f"{key}: {name!r} is the name of the labels {_numbers(labels)}; legal: one of these numbers")
    if not classes.names:
        raise ConfigError(f"{key}: {name!r} is no label, and the class names are not known; legal: {_legal(classes)}")
    folded = {part.strip().casefold(): other for other in classes.names for part in other.split(",")}
    folded |= {other.casefold(): other for other in classes.names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    guess = f"did you mean {folded[near[0]]!r}? " if near else ""
    raise ConfigError(f"{key}: {name!r} is no class of the data; {guess}legal: {_legal(classes)}")


def _check_unambiguous(item: str, labels: range, named: list[int], classes: Classes, key: str) -> None:
    """Refuse a number that is also the name of another label, for example if the folders 0..11 are sorted as text.

    Raises: ConfigError: if another label has the number as its name.
    """
    meant = {label: classes.labels_named(str(label)) for label in labels} | ({labels[0]: named} if named else {})
    for label, others in meant.items():
        if others and others != [label]:
            text = item if len(labels) == 1 or others is named else str(label)
            raise ConfigError(
                f"{key}: {text} is label {classes.describe(label)} and also the name of label {_numbers(others)}; "
                f"legal: label:{item} for the label, name:{text} for the name"
            )


def _legal(classes: Classes) -> str:
    numbers = f"0..{classes.count - 1}"
    return f"{numbers}, or a name such as {_listed(classes.names)}" if classes.names else numbers


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _numbers(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels))


def _shown(given: str | int | Sequence[str | int]) -> str:
    return str(given) if isinstance(given, str | int) else ",".join(map(str, given))


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)
