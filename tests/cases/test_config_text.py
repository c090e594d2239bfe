"""Hostile and odd configuration: one line and 78, or a valid config, within a second."""

from __future__ import annotations

import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from sdit.config import dump_config, load_config, read_deepspeed_json, read_yaml
from sdit.errors import ConfigError, ExitCode
from tests.cases.commands import ROOT, TINY, start

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MAP_LAUGHS = "a: &a {k: 1, l: 2}\n" + "".join(
    f"{new}: &{new} {{k: *{old}, l: *{old}, m: *{old}}}\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


def refusal(text: str | bytes, folder: Path) -> str:
    """Return the line that refuses a config file, after at most a second of work."""
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - began < 1
    line = str(caught.value)
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 500
    return line.removeprefix(str(path))


@pytest.mark.parametrize("text", [LAUGHS, MAP_LAUGHS, LAUGHS.replace("a: &a", "train: &a")])
def test_aliases_do_not_expand_without_a_bound(text: str, tmp_path: Path) -> None:
    """S6: Nested aliases are refused in one line, in less than a second."""
    assert len(text) < 1000
    assert "values, aliases counted in full" in refusal(text, tmp_path)


def test_an_alias_bomb_ends_a_launch_at_once(tmp_path: Path) -> None:
    """S6: A launcher refuses nested aliases with 78, in at most two seconds of CPU time."""
    (tmp_path / "bomb.yaml").write_text(LAUGHS)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    start("train", "--config", tmp_path / "bomb.yaml", "--run-dir", tmp_path / "run", seconds=120).refused(
        78, "aliases"
    )
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert cpu_seconds < 2 and not (tmp_path / "run").exists()


def test_anchors_and_aliases_still_work(tmp_path: Path) -> None:
    """S6: A few aliases are legal; what they stand for is a copy, which overrides change alone."""
    (tmp_path / "a.yaml").write_text("sample: &s {seed: 3}\nvalidation: *s\n")
    config = load_config(tmp_path / "a.yaml", ["sample.seed=5"])
    assert (config.sample.seed, config.validation.seed) == (5, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1\n", ":1: a key must be text"),
        ("? {a: b}\n: 1\n", ":1: a key must be text"),
        ("seed: &x 1\n*x : 2\n", ":2: a key must be text"),
        ("1: 2\n", ":1: 1: unknown key"),
        ("null: 2\n", ":1: null: unknown key"),
        ("seed: 1\nseed: 2\n", ":2: key 'seed' is given twice"),
        ("train:\n  steps: 3\n  steps: 4\n", ":3: key 'steps' is given twice"),
        ("train: &t {steps: 3}\nsample:\n  <<: *t\n", ":3: the merge key << is not part of YAML 1.2"),
        ("seed: " + "[" * 5000, ":1: is nested more than 16 levels deep"),
        ("seed: " + "{a: " * 5000, ":1: is nested more than 16 levels deep"),
        ("- " * 3000, ":1: is nested more than 16 levels deep"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(200)), ":18: is nested more than 16 levels deep"),
        ("seed: &a [*a]\n", ":1: an alias is inside its anchor"),
        ("seed: *nothing\n", ":1: an alias has no anchor"),
        ("train: {steps: " + "9" * 5000 + "}\n", "a value is longer than 4096 characters"),
        ("train: {steps: " + "9" * 50 + "}\n", "a number is longer than 40 characters"),
        ("seed: 0x" + "f" * 30 + "\n", "out of range; legal: less than 2^64"),
        ("optimizer: {learning_rate: 1e999}\n", "the number 1e999 is out of range"),
        ("seed: !!int abc\n", ":1: the tag !!int does not fit its value"),
        ("seed: !!timestamp 2026-99-99\n", ":1: the tag !!timestamp is not legal here"),
        ("seed: !!binary 3q2+7w==\n", ":1: the tag !!binary is not legal here"),
        ("seed: !!python/object/apply:os.system [true]\n", "is not legal here"),
        ("seed: !own 3\n", ":1: the tag !own is not legal here"),
        ("seed: !!set {a, b}\n", ":1: the tag !!set is not legal here"),
        ("seed: 2026-13-45\n", ":1: seed: '2026-13-45' is not legal"),
        ("seed: 1:0\n", ":1: seed: '1:0' is not legal (legal: a whole number)"),
        ("seed: 1_000\n", ":1: seed: '1_000' is not legal (legal: a whole number)"),
        ("seed: 0b101\n", ":1: seed: '0b101' is not legal"),
        ("data: {flip: yes}\n", ":1: data.flip: 'yes' is not legal (legal: true or false)"),
        ("data:\n  flip: on\n", ":2: data.flip: 'on' is not legal (legal: true or false)"),
        ("optimizer:\n  learning_rate: .inf\n", ":2: optimizer.learning_rate: inf is not legal (legal: a finite number)"),
        ("optimizer: {learning_rate: .nan}\n", "optimizer.learning_rate: nan is not legal (legal: a finite number)"),
        ("sample: {guidance: .inf}\n", "sample.guidance: inf is not legal (legal: a finite number)"),
        ("supervise: {step_seconds: .inf}\n", "supervise.step_seconds: inf is not legal"),
        ("train: {steps: .inf}\n", "train.steps: inf is not legal"),
        ('data: {path: "a\\0b"}\n', ":1: a value holds the control character '\\x00'"),
        ('data: {path: "a\\nb"}\n', ":1: a value holds the control character '\\n'"),
        ('data: {path: "a\\ud800b"}\n', ":1: a value is not UTF-8 text"),
        ('"a\\nb": 1\n', ":1: a key holds the control character '\\n'"),
        ('seed: "\\UFFFFFFFF"\n', "an escape or a directive holds an illegal number"),
        ("seed: \x01\n", ":1: the character '\\x01' is not legal in YAML"),
        ("train:\n\tsteps: 3\n", ":2: is not valid YAML: "),
        ("train: {steps: 3\n", "is not valid YAML: "),
        ("seed: 1\n---\nseed: 2\n", ":2: holds a second document"),
        ("[1, 2]\n", "must hold a mapping of sections, not a list"),
        ("just text\n", "must hold a mapping of sections, not a str"),
        ("train: 5\n", ":1: train: 5 is not legal; legal: a section"),
        ("train: [steps]\n", ":1: train: ['steps'] is not legal; legal: a section"),
        ("x" * 5000 + ": 1\n", "a value is longer than 4096 characters"),
        ("'" + "x" * 500 + "': 1\n", ":1: a key is longer than 100 characters"),
        ("seed: 1\n" * 20_000, "is larger than 65536 bytes"),
        ("model:\n" + "".join(f"  k{number}: 1\n" for number in range(5000)), "holds more than 4096 values"),
        ("seed: 1\n".encode("utf-16"), "is UTF-16 text; legal: the same text saved as UTF-8"),
        (b"\x7fELF\xff\xfe\x00", ":1: is not UTF-8 text"),
        (b"seed: 1\ndata: {path: caf\xe9}\n", ":2: is not UTF-8 text"),
        ("\n\ntrain:\n  # comment\n  stpes: 3\n", ":5: train.stpes: unknown key; did you mean train.steps?"),
        ("model:\n  width: 32\n  heads: 5\n", ":3: model.heads: 5 does not divide width 32"),
    ],
)  # fmt: skip
def test_odd_text_is_refused_with_file_and_line(text: str | bytes, words: str, tmp_path: Path) -> None:
    """S7: Each odd YAML text is refused in one line that names file, line and cause, in less than a second."""
    assert words in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {learning_rate: 1e-4}\n", "optimizer.learning_rate", 1e-4),
        ("optimizer: {learning_rate: 1E-4}\n", "optimizer.learning_rate", 1e-4),
        ("optimizer: {learning_rate: +.5}\n", "optimizer.learning_rate", 0.5),
        ("optimizer: {learning_rate: 1}\n", "optimizer.learning_rate", 1.0),
        ("optimizer: {learning_rate: !!float 1}\n", "optimizer.learning_rate", 1.0),
        ("observe: {wandb: off}\n", "observe.wandb", "off"),
        ("seed: 010\n", "seed", 10),
        ("seed: 0o10\n", "seed", 8),
        ("seed: 0x10\n", "seed", 16),
        ("seed: !!int 7\n", "seed", 7),
        ("seed: 18446744073709551615\n", "seed", 2**64 - 1),
        ("run_dir: !!str 007\n", "run_dir", "007"),
        ("run_dir: 'null'\n", "run_dir", "null"),
        ("run_dir: 1:0\n", "run_dir", "1:0"),
        ("run_dir: on\n", "run_dir", "on"),
        ("run_dir: 2026-11-27\n", "run_dir", "2026-11-27"),
        ("data: {flip: TRUE}\n", "data.flip", True),
        ("train: {steps: ~}\n", "train.steps", None),
        ("train: {steps: Null}\n", "train.steps", None),
        ("train:\n  steps:\n", "train.steps", None),
        ("train: {steps: 1e3}\n", "train.steps", 1000),
        ("train: {steps: 2.0}\n", "train.steps", 2),
        ("parallel: {expert: 2.0}\n", "parallel.expert", 2),
        ("\ufeffseed: 4\n", "seed", 4),
        ("%YAML 1.2\n---\nseed: 4\n...\n", "seed", 4),
        ("seed: 4\r\n", "seed", 4),
        ("", "seed", 0),
        ("# only a comment\n", "seed", 0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, key: str, value: Any, tmp_path: Path) -> None:
    """S7: Plain scalars mean what the core schema of YAML 1.2 says."""
    (tmp_path / "c.yaml").write_bytes(text.encode())
    found: Any = load_config(tmp_path / "c.yaml")
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "zero"])
def test_what_is_no_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    """S7: A folder, a pipe or a device given as --config or --ds_config is refused, and not waited for."""
    path = tmp_path / "c"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    path = {"device": Path("/dev/null"), "zero": Path("/dev/zero")}.get(kind, path)
    wanted = "cannot be read" if kind == "missing" else "legal: a regular file"
    start("train", "--config", path, seconds=120).refused(ExitCode.CONFIG, str(path), wanted)
    start("train", "--ds_config", path, seconds=120).refused(ExitCode.CONFIG, str(path), wanted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"gradient_clipping": NaN}', "the number NaN is not finite"),
        ('{"gradient_clipping": -Infinity}', "the number -Infinity is not finite"),
        ('{"gradient_clipping": 1e999}', "the number 1e999 is not finite"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "a number has more than 20 digits"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"a": ' + "[" * 20_000, "is not valid JSON"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 16 levels deep"),
        ('{"a": "\\ud800"}', "a text is not UTF-8 text"),
        ('{"a\\u0000": 1}', "a text holds the control character"),
        ("[1]", "must hold a JSON object"),
        ("", "is not valid JSON"),
        ('{"a": "' + "x" * 70_000 + '"}', "is larger than 65536 bytes"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
        (b"\xff\x00", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_odd_json_is_refused(text: str | bytes, words: str, tmp_path: Path) -> None:
    """S7: Each odd DeepSpeed JSON text is refused in one line that names the file."""
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_json(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and words in line and "\n" not in line and len(line) < 300


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """S7: A byte order mark before the JSON is no part of it."""
    (tmp_path / "ds.json").write_bytes(b'\xef\xbb\xbf{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed_json(tmp_path / "ds.json") == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("override", ["train={}", "train=5", "train=[1]", "train=null", "model.experts=[]", "seed.a=1"])
def test_sections_as_overrides_end_in_a_config_or_one_line(override: str) -> None:
    """S7: A section that an override replaces cannot break those that come after it."""
    for words in (
        [override],
        ["train.steps=3", override],
        [override, "train.images=3"],
        ["checkpoint.every_steps=1", override],
    ):
        try:
            load_config(TINY, words)
        except ConfigError as error:
            assert "\n" not in str(error)


def test_deep_and_long_overrides_are_refused() -> None:
    """S7: Keys and values of overrides have bounds, too."""
    for override in (
        "a" + ".a" * 5000 + "=1",
        "x" * 70_000 + "=1",
        "seed=" + "[" * 5000,
        "seed=" + "9" * 5000,
        "a..b=1",
        ".=1",
    ):
        with pytest.raises(ConfigError, match="command line: ") as caught:
            load_config(TINY, [override])
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "007", "1e5", "null", "~", "on", "0o7", "1:0", "exp #2", "a: b", "$HOME/x", "~/x", "a$$b", "- x", "é", ".5", "=",
        "2026-11-27",
    ],
)  # fmt: skip
def test_a_written_config_is_read_back_the_same(text: str, tmp_path: Path) -> None:
    """S7: config.yaml gives back the run folder that a run was started with, whatever its name looks like."""
    config = load_config(TINY).model_copy(update={"run_dir": text})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    found = load_config(tmp_path / "config.yaml")
    assert Path(found.run_dir) == Path(text)
    assert found.model_copy(update={"run_dir": text}) == config


def test_configs_of_the_repository_mean_what_they_meant() -> None:
    """S7: PyYAML and our reader agree on every YAML file of the repository that is a config."""
    import yaml

    files = [*ROOT.glob("configs/*.yaml"), TINY, *ROOT.glob("cluster/k8s/overlays/*/train.yaml")]
    assert len(files) >= 8
    for file in files:
        assert read_yaml(file) == yaml.safe_load(file.read_text())
        assert math.isfinite(load_config(file).optimizer.learning_rate)
