"""Loads a `Config` from a YAML file and dotted overrides. An error is one line that names the legal values."""

from __future__ import annotations

import copy
import difflib
import functools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sdit.config.paths import escape_path, expand_path
from sdit.config.schema import Config
from sdit.config.sections import PATH_MARK
from sdit.config.yaml_text import MAX_KEY, Document, YamlProblem, dump_yaml, parse_yaml
from sdit.errors import ConfigError
from sdit.redact import HIDDEN, holds_credential, redact, without_credentials
from sdit.textfile import read_text, text_problem

COMMAND_LINE = "command line"
SHOWN_CHARACTERS = 80  # of a wrong value
EXACT_FLOATS = 2.0**53  # floats up to this value hold all integers
LAST_PORT = 65_535
GATEWAY = re.compile(r"(https?://)?(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~-]*)?", re.ASCII)
HOST_KEYS = ("observe.pushgateway", "observe.metrics_address")
LEGAL = {  # type of a pydantic error -> legal values; the messages of other types contain them
    "bool_type": "legal: true or false",
    "int_type": "legal: a whole number",
    "int_from_float": "legal: a whole number",
    "float_type": "legal: a number",
    "finite_number": "legal: a finite number",
    "string_type": "legal: text; a number needs quotes to be text",
}
Sources = dict[str, str]  # dotted key of a value or section -> file and line, or the command line


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    base: dict[str, Any] | None = None,
    literal: Mapping[str, str] | None = None,
) -> Config:
    """Return the validated config of `path` with the `key.sub=value` overrides applied.

    `path` is a YAML file, or None to use only `base`. `literal` holds dotted keys with texts that are not parsed, such as
    the path of `--run-dir`.

    Raises: ConfigError: if the file is unreadable, a key is unknown, a type is wrong, values do not fit together, or a value
        holds a credential.
    """
    name = str(path) if path is not None else "default config"
    document = read_document(Path(path)) if path is not None else Document(copy.deepcopy(base or {}))
    values: dict[str, Any] = document.value
    sources = {key: f"{name}:{line}" for key, line in document.lines.items()}
    overridden = {_apply_override(values, override) for override in overrides}
    _drop_replaced(values, overridden)
    sources = {key: source for key, source in sources.items() if not _is_inside(key, overridden)}
    sources |= dict.fromkeys(overridden, COMMAND_LINE)
    for key in literal or ():
        _set(values, key, None)  # a replaced value is not validated
    _settle(values, Config, "", sources, name)
    for key, text in (literal or {}).items():
        _set(values, key, text)
        sources[key] = COMMAND_LINE
        _check_text(key, text, COMMAND_LINE)
    return parse_config(values, name, sources)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises: ConfigError: if it cannot be read, or holds duplicate keys, tags or unbounded content.
    """
    values: dict[str, Any] = read_document(path).value
    return values


def read_document(path: Path) -> Document:
    """Return the mapping in a YAML file with the line of each key.

    Raises: ConfigError: if it cannot be read.
    """
    try:
        document = parse_yaml(read_text(path))
    except YamlProblem as error:
        raise ConfigError(redact(f"{path}:{error.line}: {error}")) from None
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, not a {type(document.value).__name__}")
    return document


def parse_config(values: dict[str, Any], source: str, sources: Mapping[str, str] | None = None) -> Config:
    """Return the validated config of nested `values`.

    Raises: ConfigError: if a value is not legal. The message names the key's entry in `sources`, or `source`.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        key, text = _first_problem(error, Config)
        others = _overrides_beside(key, sources or {}) if error.errors()[0]["type"] == "value_error" else ""
        raise ConfigError(redact(f"{_source_of(key, sources or {}, source)}: {text}{others}")) from None


def parse_stored_config(values: dict[str, Any], source: str) -> tuple[Config, list[str]]:
    """Return the config of a checkpoint or published file of any version, and the keys that were removed.

    Older versions stored URLs with passwords, and infinite numbers. URLs with passwords are removed. Infinite numbers are
    replaced by the largest float.

    Raises: ConfigError: if a value is not legal.
    """
    kept, dropped = without_credentials(_finite(values))
    return parse_config(kept, source), dropped


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return sys.float_info.max if values == float("inf") else values


def describe_error(error: ValidationError, schema: type[BaseModel]) -> str:
    """Return one line for the first problem that pydantic found: key, value, legal values."""
    return redact(_first_problem(error, schema)[1])


def _first_problem(error: ValidationError, schema: type[BaseModel]) -> tuple[str, str]:
    """Return the dotted key of the first problem, and the line that describes it."""
    problem = error.errors()[0]
    location = [str(name) for name in problem["loc"] if not str(name).startswith(("function-", "lax-or-strict"))]
    keys = {key for key, _, _ in config_keys(schema)}
    # A section is what is before a dot of a key.
    sections = {key[: dot.start()] for key in keys for dot in re.finditer(r"\.", key)}
    keys |= sections
    while location and ".".join(location) not in keys and problem["type"] != "extra_forbidden":
        location.pop()  # pydantic appends the union member that it tried
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.6)
        return key, f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists the keys")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        inner = message.split(":", 1)[0]
        joined = f"{key}.{inner}" if key else inner
        return (joined, f"{joined}:{message[len(inner) + 1 :]}") if joined in keys else (key, f"{key}: {message}")
    if key in sections:
        return key, f"{key}: {shown(problem['input'])} is not legal; legal: a section, that is, a mapping of keys"
    members = [each for each in error.errors() if each["loc"][: len(location)] == problem["loc"][: len(location)]]
    if len(members) > 1:  # of a union
        legal = f"legal: {' or '.join(dict.fromkeys(map(_legal, members)))}"
    else:
        legal = LEGAL.get(problem["type"], f"{message[0].lower()}{message[1:]}")
    return key, f"{key}: {shown(problem['input'])} is not legal ({legal})"


def _legal(problem: Any) -> str:
    """Return what one member of a union takes."""
    if problem["type"] == "literal_error":
        return str(problem["ctx"]["expected"])
    return LEGAL.get(problem["type"], problem["msg"]).removeprefix("legal: ").removeprefix("Input should be ")


def shown(value: object) -> str:
    """Return `value` for an error message: short, and without a credential."""
    text = repr(value)
    if "@" in text and (":" in text or "//" in text):
        return HIDDEN
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _source_of(key: str, sources: Mapping[str, str], default: str) -> str:
    """Return the source of the key. If it is unknown, return that of the enclosing section, or of a key inside it."""
    around = key
    while around:
        if around in sources:
            return sources[around]
        around = around.rpartition(".")[0]
    return next((source for other, source in sources.items() if _is_inside(other, {key})), default)


def _overrides_beside(key: str, sources: Mapping[str, str]) -> str:
    """Return the overrides in the section of a conflict, if the reported key is not one of them."""
    section = key.partition(".")[0]
    others = [other for other, source in sources.items() if source == COMMAND_LINE and _is_inside(other, {section})]
    return "" if key in others or not others else f" (with {', '.join(others)} of the command line)"


def _is_inside(key: str, sections: typing.Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Set one `key.sub=value` in `values` and return its key.

    Raises: ConfigError: if the override is not valid.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{COMMAND_LINE}: {shown(override)}: an override has the form key.sub=value")
    if len(key) > MAX_KEY:
        raise ConfigError(f"{COMMAND_LINE}: {shown(key)}: unknown key; --help lists the keys")
    _set(values, key, _override_value(key, text))
    return key


def _override_value(key: str, text: str) -> Any:
    """Return the value of an override. Text keys use the text unchanged, other keys parse it as YAML.

    A key that accepts text or a list, such as sample.labels, parses `[cat, 0]` as YAML.
    """
    annotation = next((info.annotation for name, info, _ in config_keys() if name == key), None)
    takes = [_bare(kind) for kind in _alternatives(annotation)]
    is_text = str in takes
    if is_text and type(None) in takes and text in ("", "~", "null"):
        return None
    takes_list = any(typing.get_origin(kind) is list for kind in takes)
    if is_text and not text.startswith(("'", '"', "[") if takes_list else ("'", '"')):
        return text
    try:
        return parse_yaml(text).value
    except YamlProblem as error:
        if is_text:
            return text
        raise ConfigError(redact(f"{COMMAND_LINE}: {key}: {shown(text)} is not a YAML value ({error})")) from None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if is_union else (annotation,)


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    section, *rest = key.split(".")
    node = values
    for name in rest:
        child = node[section] = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise ConfigError(f"{COMMAND_LINE}: {key}: {section} is not a section")
        node, section = child, name
    node[section] = value


def _drop_replaced(values: dict[str, Any], overridden: set[str]) -> None:
    """Remove `train.steps` of the file if the command line sets `train.images`, and vice versa."""
    for section, first, second in (("train", "steps", "images"), ("checkpoint", "every_steps", "every_images")):
        for given, replaced in ((first, second), (second, first)):
            if f"{section}.{given}" in overridden and f"{section}.{replaced}" not in overridden:
                found = values.get(section)
                if isinstance(found, dict):
                    found.pop(replaced, None)


def _settle(values: dict[str, Any], schema: type[BaseModel], prefix: str, sources: Sources, name: str) -> None:
    """Expand paths, convert whole floats to integers, and refuse unusable text, in place.

    Raises: ConfigError: if a text or path is not usable.
    """
    for field, info in schema.model_fields.items():
        value, key = values.get(field), f"{prefix}{field}"
        if (section := _section_of(info)) is not None:
            if isinstance(value, dict):
                _settle(value, section, f"{key}.", sources, name)
        elif isinstance(value, float) and value.is_integer() and abs(value) <= EXACT_FLOATS and _takes_int(info):
            values[field] = int(value)
        elif isinstance(value, str):
            source = _source_of(key, sources, name)
            _check_text(key, value, source)
            if is_path(info):
                try:
                    values[field] = expand_path(value)
                except ValueError as error:
                    raise ConfigError(redact(f"{source}: {key}: {shown(value)}: {error}")) from None
                _check_text(key, values[field], source)


def _check_text(key: str, text: str, source: str) -> None:
    """Refuse text that cannot be written, and credentials, because the config is written to files.

    Raises: ConfigError: if `text` is one of them.
    """
    if problem := text_problem(text):
        raise ConfigError(f"{source}: {key}: {shown(text)} {problem}; legal: printable text")
    is_gateway = key == "observe.pushgateway"
    if holds_credential(text) or (key in HOST_KEYS and "@" in text):
        legal = (
            "the URL without it, observe.pushgateway_user, and the password in the file observe.pushgateway_password_file "
            "or in the variable SDIT_PUSHGATEWAY_PASSWORD"
            if is_gateway
            else "the same without it"
        )
        raise ConfigError(
            f"{source}: {key}: holds a credential, and a config is written to the run's files; legal: {legal}"
        )
    match = GATEWAY.fullmatch(text)
    if is_gateway and (match is None or int((match[3] or ":0")[1:]) > LAST_PORT):
        raise ConfigError(
            f"{source}: {key}: {shown(text)} is not legal; legal: http://HOST:PORT or https://HOST:PORT/PATH"
        )


def is_path(info: Any) -> bool:
    """Return True if a field of the schema holds a path."""
    kinds = [info, *_alternatives(info.annotation)]
    marks = [getattr(kind, "metadata", ()) or getattr(kind, "__metadata__", ()) for kind in kinds]
    return any(PATH_MARK in found for found in marks)


def _takes_int(info: Any) -> bool:
    takes = typing.get_args(info.annotation) or (info.annotation,)
    return float not in takes and any(kind is int or type(kind) is int for kind in takes)


def config_keys(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, typing.Any, Any]]:
    """Yield (dotted key, field info, default) of each leaf of the schema, in order.

    A section that may be null is a leaf too. The defaults of its keys are those that they have if it is not null.
    """
    for name, info in schema.model_fields.items():
        section = _section_of(info)
        if section is None or info.default is None:
            yield f"{prefix}{name}", info, info.default
        if section is not None:
            yield from config_keys(section, f"{prefix}{name}.")


def is_inside_null(key: str, values: Mapping[str, Any]) -> bool:
    """Return True if a dotted key is inside a section that may be null, and the nested `values` have no such section."""
    schema: type[BaseModel] | None = Config
    node: Any = values
    for name in key.split(".")[:-1]:
        info = schema.model_fields.get(name) if schema is not None else None
        if info is None:
            return False
        node = node.get(name) if isinstance(node, Mapping) else None
        if info.default is None and node is None:
            return True
        schema = _section_of(info)
    return False


def _section_of(info: Any) -> type[BaseModel] | None:
    """Return the section that a field of the schema holds, or holds if it is not null. None: it is a value."""
    kinds = [kind for kind in _alternatives(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return kinds[0] if kinds else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def config_manual() -> str:
    """Return the text of `--help`: each key with its type, default, unit and effect."""
    lines = ["config keys (YAML sections; on the command line as key.sub=value):"]
    for key, info, default in config_keys():
        text = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        kind = _type_text(info.annotation)
        lines.append(f"  {key}  [{kind.replace('str', 'path') if is_path(info) else kind}; default {text}]")
        lines += textwrap.wrap(info.description or "", 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if len(_alternatives(annotation)) > 1:
        kinds = [_type_text(kind) for kind in _alternatives(annotation)]
        return "|".join("null" if kind == "NoneType" else kind for kind in kinds)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return str(getattr(_bare(annotation), "__name__", annotation))


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML. `load_config` reads it back to an equal object."""
    values = config.model_dump(mode="json")
    for key, info, _ in config_keys():
        if is_path(info):
            *sections, name = key.split(".")
            node = functools.reduce(lambda node, section: node[section], sections, values)
            node[name] = None if node[name] is None else escape_path(node[name])
    return dump_yaml(values)
