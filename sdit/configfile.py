"""From a YAML file and dotted overrides to a `Config`; every mistake becomes one line that says what would be legal."""

from __future__ import annotations

import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sdit.config import Config
from sdit.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a string, because it wants 1.0e-4; people do not.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Return the validated config of `path` (YAML; None: only `base`) with `key.sub=value` overrides applied.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible combination.
    """
    values = read_yaml(Path(path)) if path is not None else dict(base or {})
    for override in overrides:
        _apply_override(values, override)
    _drop_replaced(values, {override.partition("=")[0] for override in overrides})
    return parse_config(values, str(path) if path is not None else "default config")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; duplicate keys, Python tags and files over 1 MiB are refused."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes; is it a config?")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, not a {type(values).__name__}")
    return values


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validate nested `values`; `source` names them in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe_error(error, Config)}") from None


def describe_error(error: ValidationError, schema: type[BaseModel]) -> str:
    """Return one line for the first problem pydantic found: key, value, what is legal."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "lax-or-strict"))]
    keys = {key for key, _, _ in config_keys(schema)} | _section_names(schema)
    while location and ".".join(location) not in keys and problem["type"] != "extra_forbidden":
        location.pop()  # pydantic appends the union member it tried
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.6)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; --help lists the keys")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        inner = message.split(":", 1)[0]
        joined = f"{key}.{inner}" if key else inner
        return f"{joined}:{message[len(inner) + 1 :]}" if joined in keys else f"{key}: {message}"
    return f"{key}: {problem['input']!r} is not legal ({message[0].lower()}{message[1:]})"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override has the form key.sub=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value") from error
    section, *rest = key.split(".")
    node = values
    for part in rest:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key}: {section} is not a section")
        node, section = child, part
    node[section] = value


def _drop_replaced(values: dict[str, Any], overridden: set[str]) -> None:
    """`train.images=...` on the command line replaces the file's `train.steps`, and the other way round."""
    for section, first, second in (("train", "steps", "images"), ("checkpoint", "every_steps", "every_images")):
        for given, replaced in ((first, second), (second, first)):
            if f"{section}.{given}" in overridden and f"{section}.{replaced}" not in overridden:
                values[section].pop(replaced, None)


def config_keys(schema: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, typing.Any, Any]]:
    """Yield (dotted key, field info, default) of every leaf of the schema, in order."""
    for name, info in schema.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from config_keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info, info.default


def _section_names(schema: type[BaseModel], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, info in schema.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names |= {f"{prefix}{name}"} | _section_names(info.annotation, f"{prefix}{name}.")
    return names


def config_manual() -> str:
    """Return the text of `--help`: every key with its type, default, unit and effect."""
    lines = ["config keys (YAML sections; on the command line as key.sub=value):"]
    for key, info, default in config_keys():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {key}  [{_type_text(info.annotation)}; default {shown}]")
        lines += textwrap.wrap(info.description or "", 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        parts = [_type_text(part) for part in typing.get_args(annotation)]
        return "|".join("null" if part == "NoneType" else part for part in parts)
    return getattr(annotation, "__name__", str(annotation))


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to the same object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
