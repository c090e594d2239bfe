"""Presets: found by name, never mistaken for a file, and copied without harm."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from sdit import cli
from sdit.cli import evaluate, plan, routing, sample, submit, train
from sdit.cli.presets import CONFIGS, DEEPSPEED, HARDWARE, config_file, deepspeed_file, presets
from sdit.config import load_config, read_deepspeed_json
from sdit.errors import ExitCode

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return the exit status and the one line on stderr of a refused command."""
    capsys.readouterr()
    try:
        status = cli.run(words)
    except SystemExit as end:
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return status, error


def test_every_config_of_the_repository_is_a_preset_and_is_legal() -> None:
    assert set(presets(CONFIGS).values()) == set((ROOT / "configs").glob("*.yaml"))
    assert set(presets(DEEPSPEED).values()) == set((ROOT / "configs" / "deepspeed").glob("*.json"))
    assert set(presets(HARDWARE).values()) == set((ROOT / "configs" / "hardware").glob("*.yaml"))
    assert not presets(CONFIGS).keys() & presets(DEEPSPEED).keys()
    for name in presets(CONFIGS):
        assert load_config(config_file(name)) == load_config(ROOT / "configs" / f"{name}.yaml")
    for name in presets(DEEPSPEED):
        assert read_deepspeed_json(deepspeed_file(name)) == json.loads(presets(DEEPSPEED)[name].read_text())


@pytest.mark.parametrize("text", ["digits.yaml", "./digits", "no/such", "digits.yml", "/dev/fd/3"])
def test_text_with_a_slash_or_an_ending_is_a_path(text: str) -> None:
    assert config_file(text) == Path(text)


@pytest.mark.parametrize("text", ["zero1.json", "./zero1", ""])
def test_a_deepspeed_path_is_taken_literally(text: str) -> None:
    assert deepspeed_file(text) == text


def test_a_file_never_hides_a_preset(tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("seed: 1\n")
    assert config_file("digits") == presets(CONFIGS)["digits"]
    (tmp_path / "mine").write_text("seed: 1\n")
    with pytest.raises(argparse.ArgumentTypeError, match="'mine' is not a preset"):
        config_file("mine")


def test_every_command_finds_presets_by_name() -> None:
    xl2, zero2 = presets(CONFIGS)["imagenet256_xl2"], str(presets(DEEPSPEED)["zero2"])
    words = ["--config", "imagenet256_xl2", "--ds_config", "zero2"]
    for options in (
        train.parse(words),
        submit.parse([*words, "--run-dir", "r"]),
        plan.parse(["imagenet256_xl2", *words[2:]]),
    ):
        assert (options.config, options.ds_config) == (xl2, zero2)
    assert train.parse(["--deepspeed", "zero2", "train.steps=3"]).ds_config == zero2
    read = ["--checkpoint", "c", "--config", "imagenet256_xl2"]
    assert sample.parse([*read, "--out", "x.png"]).config == xl2
    assert routing.parse([*read, "--out", "x.png"]).config == xl2
    assert evaluate.parse([*read, "--images", "1", "--reference", "digits", "--out", "x.json"]).config == xl2


def test_train_starts_from_the_digits_and_zero1() -> None:
    options = train.parse([])
    assert (options.config, options.ds_config) == (presets(CONFIGS)["digits"], str(presets(DEEPSPEED)["zero1"]))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("train", "--config", "digit"), "'digit' is not a preset; did you mean digits? legal: digits, ditmoe_b2_8e2a"),
        (("train", "--ds_config", "zero3"), "'zero3' is not a preset; did you mean zero2? legal: zero0, zero1"),
        (("plan", "imagenet"), "or a path with a slash or the ending .yaml"),
        (("config", "show", "x"), "'x' is not a preset; legal: digits"),
    ],
)
def test_an_unknown_name_gets_one_line_with_the_legal_ones(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hint: str
) -> None:
    status, error = refusal(capsys, *words)
    assert status == ExitCode.USAGE and hint in error


def test_list_names_all_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "list"]) == ExitCode.DONE
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert names == [*presets(CONFIGS), *presets(DEEPSPEED), *presets(HARDWARE)]


@pytest.mark.parametrize("name", ["digits", "zero1", "h100-ib"])
def test_show_prints_the_file(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.run(["config", "show", name]) == ExitCode.DONE
    assert capsys.readouterr().out == (presets(CONFIGS) | presets(DEEPSPEED) | presets(HARDWARE))[name].read_text()


def test_new_copies_a_preset_and_never_overwrites(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["config", "new", "digits"]) == ExitCode.DONE
    assert cli.run(["config", "new", "zero2", "--out", "mine.json"]) == ExitCode.DONE
    assert capsys.readouterr().out == "digits.yaml\nmine.json\n"
    assert (tmp_path / "digits.yaml").read_bytes() == presets(CONFIGS)["digits"].read_bytes()
    assert (tmp_path / "mine.json").read_bytes() == presets(DEEPSPEED)["zero2"].read_bytes()
    (tmp_path / "mine.yaml").symlink_to("elsewhere")
    for target in ("digits.yaml", "mine.yaml"):
        status, error = refusal(capsys, "config", "new", "imagenet256_s2", "--out", target)
        assert status == ExitCode.CONFIG and f"--out: {target} exists already" in error
    assert (tmp_path / "digits.yaml").read_bytes() == presets(CONFIGS)["digits"].read_bytes()
    assert not (tmp_path / "elsewhere").exists()
