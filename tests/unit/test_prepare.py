"""The command line of prepare: one clear line, the right exit status, and the same command continues."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.errors import ExitCode

SCRIPT = Path(__file__).parents[2] / "launcher" / "prepare.py"
Command = Callable[..., int]


@pytest.fixture(scope="module")
def prepare() -> Command:
    """`main` of the script, taking its words."""
    spec = importlib.util.spec_from_file_location("prepare_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> int:
        try:
            return int(module.main([str(word) for word in words]))
        except SystemExit as end:
            return int(end.code or 0)

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six images of two classes."""
    rng = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "tree" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return tmp_path / "tree"


def test_digits_are_prepared_then_kept_then_verified(
    prepare: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits"
    assert prepare("digits", "--out", out) == ExitCode.DONE
    assert prepare("digits", "--out", out) == ExitCode.DONE
    assert prepare("--verify", out) == ExitCode.DONE
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("1797 images of 1 x 8 x 8, 10 classes; 2 shards written, 0 kept, 0 images skipped")
    assert second.endswith("0 shards written, 2 kept, 0 images skipped")
    assert third.endswith("2 shards, 1797 images, all intact")


def test_a_folder_of_images_is_prepared(prepare: Command, tree: Path, tmp_path: Path) -> None:
    words = ("folder", "--images", tree, "--size", 8, "--out", tmp_path / "set", "--samples-per-shard", 4)
    assert prepare(*words) == ExitCode.DONE
    assert len(list((tmp_path / "set").glob("*.tar"))) == 2


def test_bad_images_stop_or_are_skipped(
    prepare: Command, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "a" / "0.png").write_bytes(b"not an image")
    words = ("folder", "--images", tree, "--size", 8, "--out")
    assert prepare(*words, tmp_path / "strict") == ExitCode.DATA
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tree}/a/0.png: cannot be decoded" in error
    assert prepare(*words, tmp_path / "lenient", "--skip-bad") == ExitCode.DONE
    assert "5 images" in (captured := capsys.readouterr()).out and "1 images skipped" in captured.out


def test_verify_reports_damage(
    prepare: Command, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("folder", "--images", tree, "--size", 8, "--out", tmp_path / "set")
    shard = tmp_path / "set" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert prepare("--verify", tmp_path / "set") == ExitCode.DATA
    assert "shard-000000.tar: has 20479 bytes, the index says 20480 (size)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), ExitCode.USAGE, "give a source"),
        (("--verify", "x", "digits", "--out", "y"), ExitCode.USAGE, "give a source"),
        (("digits",), ExitCode.USAGE, "--out"),
        (("digits", "--out", "x", "--jobs", "0"), ExitCode.USAGE, "--jobs"),
        (("cifar", "--out", "x"), ExitCode.USAGE, "cifar"),
        (("--verify", "/none"), ExitCode.DATA, "/none/index.json: no such file"),
        (("folder", "--images", "/none", "--size", "8", "--out", "x"), ExitCode.DATA, "/none: no such folder"),
        (("fashion-mnist", "--files", "/none", "--out", "x"), ExitCode.DATA, "/none/train-images-idx3-ubyte.gz"),
        (
            ("latents", "--vae", "/none", "--images", "/none", "--size", "8", "--out", "x"),
            ExitCode.CONFIG,
            "--vae: /none/config.json",
        ),
        (("digits", "--out", "/dev/null/x"), ExitCode.IO, "/dev/null"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    prepare: Command, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: ExitCode, message: str
) -> None:
    assert prepare(*words) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_stop_by_hand_asks_to_be_run_again(prepare: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdit.data.prepare.prepare", stopped)
    assert prepare("digits", "--out", tmp_path / "set") == ExitCode.REQUEUE


@pytest.mark.parametrize(("written", "name"), [(0, "progress.jsonl"), (1, "shard-000000.tar")])
def test_a_full_disk_is_a_file_system_error_that_names_the_file(
    prepare: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    written: int,
    name: str,
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert prepare("digits", "--out", tmp_path / "set") == ExitCode.IO
    assert capsys.readouterr().err == f"error: {tmp_path}/set/{name}: No space left on device\n"


def test_help_needs_no_heavy_import() -> None:
    code = f"import sys, runpy; sys.argv = ['prepare', '--help']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    ended = f"try:\n {code}\nexcept SystemExit: assert not {{'numpy', 'torch'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", ended], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stderr
    for word in ("digits", "fashion-mnist", "folder", "latents", "--verify"):
        assert word in done.stdout
