"""The built wheel by itself: what it holds, and that it trains, draws and reports outside of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.runs import free_ports
from tests.distributed.harness import ROOT

pytestmark = pytest.mark.cluster

SECONDS = 240.0
KEPT = ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS")
Command = Callable[..., str]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a program of a virtual environment that holds the wheel, outside of the repository; returns its output.

    Dependencies come from this interpreter's packages. Its editable installation of sdit does not: a `.pth` line adds a folder
    without the `.pth` files in it.
    """
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=SECONDS)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=SECONDS
    )
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {
        "PATH": f"{python.parent}:/usr/bin:/bin"
    }
    (folder / "work").mkdir()

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [str(python.parent / program), *words], cwd=folder / "work", env=environment,
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


def test_the_wheel_holds_the_package_and_the_presets_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sdit"}  # no package `launcher`
    presets = {name.removeprefix("sdit/presets/") for name in names if name.startswith("sdit/presets/")}
    configs = ROOT / "configs"
    assert presets == {
        str(path.relative_to(configs)) for path in configs.rglob("*") if path.suffix in (".yaml", ".json")
    }
    assert "\nRequires-Python: >=3.11\n" in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"\nClassifier: Programming Language :: Python :: {version}\n" in metadata


def test_the_wheel_s_code_runs_and_nothing_of_the_repository(installed: Command) -> None:
    code = "import sdit, importlib.util as u; print(sdit.__file__, u.find_spec('launcher'), u.find_spec('tests'))"
    file, launcher, tests = installed("python", "-c", code).split()
    assert "/installed" in file and str(ROOT) not in file
    assert (launcher, tests) == ("None", "None")
    assert "digits" in installed("sdit", "config", "list")
    assert installed("sdit", "config", "show", "digits") == (ROOT / "configs" / "digits.yaml").read_text()


def test_the_wheel_trains_draws_and_reports(installed: Command) -> None:
    installed("sdit", "train", "--config", "digits", "train.steps=20", "--run-dir", "run")
    work = Path(installed("python", "-c", "import os; print(os.getcwd())").strip())
    steps = [json.loads(line)["step"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 20
    assert installed("sdit", "sample", "--checkpoint", "run", "--out", "grid.png", "--steps", "5") == "grid.png\n"
    installed("sdit", "report", "run")
    assert (work / "grid.png").stat().st_size and (work / "run" / "report.html").stat().st_size


@pytest.mark.parametrize(
    "launcher",
    [("torch.distributed.run", "--nproc_per_node=2", "-m"), ("deepspeed.launcher.runner", "--num_gpus=2", "--module")],
)
def test_launchers_start_ranks_of_the_wheel(installed: Command, launcher: tuple[str, ...]) -> None:
    module, *options = launcher
    words = ["--config", "digits", "--ds_config", "zero2", "train.steps=2", "--run-dir", module]
    installed("python", "-m", module, f"--master_port={free_ports(1)[0]}", *options, "sdit.cli.train", *words)
    work = Path(installed("python", "-c", "import os; print(os.getcwd())").strip())
    last = json.loads((work / module / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert json.loads((work / module / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
