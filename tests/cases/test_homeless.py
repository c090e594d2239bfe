"""Users without a home folder or a name, as containers have them (R6)."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdit import cli
from tests.distributed.harness import ROOT
from tests.unit.written_run import tiny_config, write_run

UNKNOWN_UID = 12345
KEEP = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def become_unknown() -> None:
    """In a child before it starts: a user without a name, who may read everything and writes only what is his."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = 0x10000000  # CLONE_NEWUSER
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(namespace):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{UNKNOWN_UID} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{UNKNOWN_UID} {gid} 1")


def run(words: list[str], environment: dict[str, str], unknown: bool) -> tuple[int, str]:
    """Exit status and output of a launcher of a user without a home."""
    command = [sys.executable, str(ROOT / "launcher" / words[0]), *words[1:]]
    try:
        done = subprocess.run(
            command, env=KEEP | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            preexec_fn=become_unknown if unknown else None, check=False,
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        pytest.skip(f"no user namespaces here: {error}")
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", tiny_config("model.input_size=8", "model.classes=10"))
    return tmp_path


HOMES = {"no home": {}, "HOME=/proc": {"HOME": "/proc"}, "HOME=": {"HOME": ""}}


def evaluation(place: Path, *more: str) -> list[str]:
    out = ["--images", "20", "--steps", "1", "--reference", "digits", "--out", str(place / "out.json")]
    return ["evaluate.py", "--checkpoint", str(place / "run"), *out, *more]


@pytest.mark.slow  # 10 s of training features each; the next tests stop before that
@pytest.mark.parametrize("home", HOMES)
def test_a_user_without_a_home_evaluates(place: Path, home: str) -> None:
    """R6: Features are cached in the run if the user has no home folder."""
    status, output = run(evaluation(place), HOMES[home], unknown=True)
    assert status == 0 and json.loads((place / "out.json").read_text())["fid"] > 0, output
    assert list((place / "run" / "cache" / "sdit" / "features").glob("classifier-*.safetensors")), output
    assert "Matplotlib" not in output


def test_a_cache_that_cannot_be_written_is_found_before_drawing(place: Path) -> None:
    """R6: The cache folder is checked first, not after all images are drawn."""
    status, output = run(evaluation(place, "--cache", "/proc/none"), {}, unknown=False)
    assert status == 78 and output == "error: --cache: /proc/none cannot be written; legal: a folder that can\n"
    assert not (place / "out.parts").exists()


@pytest.mark.parametrize("home", HOMES)
def test_caches_fall_back_into_the_run(
    place: Path, home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R6: Without a home the features are learnt into the run's folder."""
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in HOMES[home].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(f"uid not found: {uid}")))
    monkeypatch.setattr("sdit.distributed.comm.set_threads", lambda *_: 1)
    monkeypatch.setattr("sdit.evaluate.classifier.MIN_STEPS", 1)
    monkeypatch.setattr("sdit.evaluate.classifier.EPOCHS", 0)
    assert cli.run(["evaluate", *evaluation(place)[1:]]) == 0, capsys.readouterr()
    assert list((place / "run" / "cache" / "sdit" / "features").glob("classifier-*.safetensors"))
    assert not (place / "out.parts").exists()


@pytest.mark.parametrize("home", ["no home", "HOME=/proc"])
def test_trained_features_of_a_published_file_lie_beside_the_result(place: Path, home: str) -> None:
    """R6: If there is no run folder, the fallback is beside --out; a reference alone has one as well."""
    words = ["evaluate.py", "--reference", str(place / "none.npz"), "--train-on", "digits"]
    status, output = run([*words, "--save-reference", str(place / "new" / "a.npz")], HOMES[home], unknown=True)
    assert (status, output) == (65, f"error: {place}/none.npz: no such file\n")


COMMANDS = {
    "sample": ["sample.py", "--checkpoint", "{run}", "--out", "{place}/grid.png"],
    "routing": ["routing.py", "--checkpoint", "{run}", "--out", "{place}/routing.png"],
    "train": ["train.py", "--run-dir", "{place}/new", "train.steps=2", "sample.steps=1", "sample.images_per_class=1"],
    "report": ["report.py", "{run}", "--out", "{place}/report.html"],
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_other_commands_need_no_home(place: Path, verb: str) -> None:
    """R6: No command needs a home folder or a user name, and none warns about it."""
    shutil.copy(ROOT / "configs" / "digits.yaml", place / "run" / "config.yaml")
    words = [word.format(run=place / "run", place=place) for word in COMMANDS[verb]]
    status, output = run(words, {}, unknown=True)
    assert status == 0 and "home" not in output.lower(), output


def test_wandb_finds_a_home(tmp_path: Path) -> None:
    """R6: Libraries that ask for the home folder get one inside the run."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom sdit.caches import use_cache\n"
        "use_cache([Path('run/cache')])\nprint(Path.home(), Path('~/x').expanduser())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT)], env=KEEP, cwd=tmp_path, preexec_fn=become_unknown,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.SubprocessError as error:
        pytest.skip(f"no user namespaces here: {error}")
    assert done.stdout.split() == [f"{tmp_path}/run/cache", f"{tmp_path}/run/cache/x"], done.stderr
