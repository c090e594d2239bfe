"""S7: Whatever the text of a config or an override: one line and 78, or a valid config, within a second."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdit.config import Config, config_keys, dump_config, load_config
from sdit.errors import ConfigError
from tests.cases.commands import TINY

BOUNDED = settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
KEYS = [key for key, _, _ in config_keys()]
SECTIONS = sorted({part for key in KEYS for part in key.split(".")})
ODD = [
    "1:0", "010", "0o10", "0x1f", "1_000", "1e3", "1e-4", "2.0", ".inf", "-.inf", ".nan", "1e999", "yes", "on", "~", "null", "''",
    "2026-13-45", "!!int abc", "!!timestamp x", "!!python/none x", "&a 1", "*a", "<<", "[", "]", "{", "}", "- x", "? y", "|\n  x",
    '"\\0"', '"\\ud800"', '"\\U00110000"', "9" * 30, "9" * 5000, "-0", "--1", "\x00", "\ufeff", "\u2028", "\t", "%", "$HOME",
    "${NO_SUCH_VARIABLE}", "~nobody-at-all/x", "http://u:p@h", "a" * 5000, "é", "\x85",
]  # fmt: skip
SCALARS = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
TEXTS = st.one_of(
    st.text(max_size=200),
    st.text(alphabet=" \n\t:-?[]{}&*!|>'\"%#,ab01.", max_size=120),
    st.lists(st.tuples(st.sampled_from(SECTIONS), SCALARS), max_size=6).map(
        lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs)
    ),
    st.lists(st.tuples(st.sampled_from(KEYS), SCALARS), max_size=6).map(
        lambda pairs: "".join(_nested(key, value) for key, value in pairs)
    ),
    st.binary(max_size=60).map(lambda content: content.decode("latin-1")),
)
OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), SCALARS).map("=".join),
        st.tuples(st.sampled_from(SECTIONS), st.text(alphabet="{}[]:, a1", max_size=20)).map("=".join),
        st.text(max_size=30),
    ),
    max_size=4,
)


def _nested(key: str, value: str) -> str:
    parts = key.split(".")
    return "".join(
        f"{'  ' * depth}{part}:{'' if part != parts[-1] else ' ' + value}\n" for depth, part in enumerate(parts)
    )


def load(path: Path, overrides: Sequence[str] = ()) -> None:
    """Assert that loading ends in one line or a config that can be written and read back, within a second."""
    began = time.process_time()
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert isinstance(config, Config)
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
    assert time.process_time() - began < 1


@BOUNDED
@given(TEXTS)
def test_any_yaml_text(text: str) -> None:
    """S7: Any text as a config file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        load(path)


@BOUNDED
@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    """S7: Any bytes as a config file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        load(path)


@BOUNDED
@given(OVERRIDES)
def test_any_overrides(overrides: list[str]) -> None:
    """S7: Any overrides of a good config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(TINY.read_text())
        load(path, overrides)


@BOUNDED
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(SECTIONS), inner, max_size=3),
        max_leaves=12,
    ),
    st.booleans(),
)
def test_any_structure(values: object, is_flow: bool) -> None:
    """S7: Any structure that PyYAML writes, as a config file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(values, default_flow_style=is_flow), encoding="utf-8")
        load(path)
