"""Parses YAML 1.2 text to plain values: the core schema's scalars, text keys, and limits on depth, aliases and numbers.

PyYAML parses the syntax. Its constructors are not used, because they follow YAML 1.1. There `010` is 8, `1:0` is 60,
`on` is true and `1e-4` is text. They also expand nested aliases without a limit.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from sdit.textfile import text_problem

MAX_DEPTH = 16
MAX_NODES = 4096  # a complete config holds about 200
MAX_KEY = 100
MAX_TEXT = 4096
MAX_DIGITS = 40  # of a number as it is written
INT_LIMIT = 1 << 64

_CORE = "tag:yaml.org,2002:"
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class YamlProblem(ValueError):
    """An error in YAML text. The message does not quote the text, which may hold a secret."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Document:
    """The value of a YAML text, and the line (from 1) of each dotted key."""

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)


def parse_yaml(text: str) -> Document:
    """Return the only document of a YAML text. Empty text gives None.

    Raises: YamlProblem: if the text is not valid or exceeds a limit.
    """
    try:
        return _Builder(text).document()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = chr(error.character) if isinstance(error.character, int) else error.character
        raise YamlProblem(f"the character {character!r} is not legal in YAML", line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(text for text in (error.context, error.problem) if text)
        raise YamlProblem(f"is not valid YAML: {problem}", mark.line + 1 if mark is not None else 1) from None
    except YamlProblem:
        raise
    except (ValueError, OverflowError):  # PyYAML does not check the numbers in escapes and directives
        raise YamlProblem("is not valid YAML: an escape or a directive holds an illegal number", 1) from None


class _Builder:
    """Builds the value of one document from PyYAML's events."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._nodes = 0
        # The value and the number of its nodes, or None while it is incomplete.
        self._anchors: dict[str, tuple[Any, int] | None] = {}
        self._found = Document()

    def document(self) -> Document:
        next(self._events)  # the start of the stream
        event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            self._found.value = self._value(next(self._events), "", 0)
            next(self._events)  # the end of the document
            event = next(self._events)
        if isinstance(event, yaml.DocumentStartEvent):
            raise YamlProblem("holds a second document; legal: one", _line(event))
        return self._found

    def _value(self, event: Any, key: str, depth: int) -> Any:
        self._count(1, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            raise YamlProblem(f"is nested more than {MAX_DEPTH} levels deep", _line(event))
        before = self._nodes
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        value = self._content(event, key, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, 1 + self._nodes - before)
        return value

    def _content(self, event: Any, key: str, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        wanted = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", _CORE + wanted):
            raise YamlProblem(f"the tag {_shown_tag(event.tag)} is not legal here", _line(event))
        return self._mapping(key, depth) if wanted == "map" else self._sequence(key, depth)

    def _mapping(self, prefix: str, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._key(event)
            if name in values:
                raise YamlProblem(f"key {name!r} is given twice", _line(event))
            dotted = f"{prefix}.{name}" if prefix else name
            self._found.lines.setdefault(dotted, _line(event))
            values[name] = self._value(next(self._events), dotted, depth + 1)
        return values

    def _key(self, event: Any) -> str:
        self._count(1, event)
        if not isinstance(event, yaml.ScalarEvent):
            raise YamlProblem("a key must be text, not a list, a mapping or an alias", _line(event))
        if event.value == "<<" and event.implicit[0]:
            raise YamlProblem("the merge key << is not part of YAML 1.2; legal: the keys themselves", _line(event))
        if len(event.value) > MAX_KEY:
            raise YamlProblem(f"a key is longer than {MAX_KEY} characters", _line(event))
        if problem := text_problem(event.value):
            raise YamlProblem(f"a key {problem}", _line(event))
        return str(event.value)

    def _sequence(self, key: str, depth: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, key, depth + 1))
        return values

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            raise YamlProblem("an alias has no anchor before it", _line(event))
        anchored = self._anchors[event.anchor]
        if anchored is None:
            raise YamlProblem("an alias is inside its anchor", _line(event))
        value, nodes = anchored
        self._count(nodes, event)
        return copy.deepcopy(value)

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise YamlProblem(f"holds more than {MAX_NODES} values, aliases counted in full", _line(event))


def _scalar(event: yaml.ScalarEvent) -> Any:
    text, tag = event.value, event.tag
    if len(text) > MAX_TEXT:
        raise YamlProblem(f"a value is longer than {MAX_TEXT} characters", _line(event))
    if tag in (None, "!"):
        value = _resolve(text, event) if event.implicit[0] and tag is None else text
    elif tag == f"{_CORE}str":
        value = text
    else:
        value = _tagged(tag.removeprefix(_CORE), text, event)
    if isinstance(value, str) and (problem := text_problem(value)):
        raise YamlProblem(f"a value {problem}", _line(event))
    return value


def _tagged(tag: str, text: str, event: yaml.ScalarEvent) -> Any:
    kinds: dict[str, type] = {"int": int, "float": float, "bool": bool, "null": type(None)}
    if tag not in kinds:
        raise YamlProblem(f"the tag {_shown_tag(event.tag or '')} is not legal here", _line(event))
    value = _resolve(text, event)
    if tag == "float" and type(value) is int:
        return float(value)
    if type(value) is not kinds[tag]:
        raise YamlProblem(f"the tag !!{tag} does not fit its value", _line(event))
    return value


def _resolve(text: str, event: yaml.ScalarEvent) -> Any:
    """Return the value of a plain scalar. Source: YAML 1.2.2, section 10.3.2."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    is_int = _INT.fullmatch(text)
    if not is_int and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise YamlProblem(f"a number is longer than {MAX_DIGITS} characters", _line(event))
    if is_int:
        bases = {"0o": 8, "0x": 16}
        base = bases.get(text[:2], 10)
        number = int(text if base == 10 else text[2:], base)
        if abs(number) >= INT_LIMIT:
            raise YamlProblem(f"the number {text} is out of range; legal: less than 2^64", _line(event))
        return number
    if text[-1].isalpha():  # .inf or .nan
        return float(text.lower().replace(".", ""))
    if math.isinf(value := float(text)):
        raise YamlProblem(f"the number {text} is out of range", _line(event))
    return value


def _shown_tag(tag: str) -> str:
    return (f"!!{tag.removeprefix(_CORE)}" if tag.startswith(_CORE) else tag)[:MAX_KEY]


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""


_Dumper.add_implicit_resolver(f"{_CORE}float", re.compile(f"(?:{_FLOAT.pattern})\\Z"), list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_CORE}int", re.compile(f"(?:{_INT.pattern})\\Z"), list("-+0123456789"))


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML that `parse_yaml`, and parsers of YAML 1.1, read back as `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
