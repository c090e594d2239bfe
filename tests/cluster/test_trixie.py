"""A bare Debian 13 (Python 3.13, no compiler): `pip install` of the wheel, and a few steps of the demo on two ranks.

Takes three to eight minutes and 6 GB of disk, of which up to 2.5 GB are downloaded. SDIT_TEST_TRIXIE names a folder that is kept,
so that the next run finds the packages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.docker_image import torch_version
from tests.distributed.harness import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SECONDS = 600.0
PACKAGES = "python3,python3-venv,ca-certificates"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# A mount and process namespace of its own: when the command ends, so do its mounts and all that it started.
ENTER = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec")
MOUNT = 'mount -t proc proc "$0/proc"; mount -t tmpfs tmpfs "$0/dev/shm"; exec chroot "$0" "$@"'
STEPS = 4


def enter(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `root` as a user who has activated the virtual environment, in an empty folder."""
    passed = {
        name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")
    }
    environment = {
        **passed,
        "HOME": "/root",
        "PATH": "/opt/venv/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "OMP_NUM_THREADS": "1",
    }
    words = [*ENTER, MOUNT, str(root), *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=SECONDS)


def mirror() -> str:
    """Return the address of Debian's archive that this machine's apt uses."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    addresses = [word for line in lines if not line.startswith("#") for word in line.split() if "://" in word]
    return next((word for word in addresses if re.search(r"/debian/?$", word)), "http://deb.debian.org/debian")


@pytest.fixture(scope="module")
def trixie(wheel: Path) -> Iterator[Path]:
    """The root folder of a Debian 13 with the wheel in /opt/venv, with the versions in constraints.txt."""
    kept = os.environ.get("SDIT_TEST_TRIXIE")
    folder = Path(kept or tempfile.mkdtemp(prefix="sdit-trixie-", dir="/var/tmp"))  # too large for a tmpfs
    try:
        root = folder / "root"
        if not (root / "opt" / "venv").exists():
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", str(root), mirror()]
            subprocess.run(command, check=True, timeout=SECONDS)
        for path in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):
            shutil.copy(f"/{path}", root / path)
        shutil.copy(ROOT / "constraints.txt", root / "tmp")
        shutil.copy(wheel, root / "tmp")
        install(root, f"/tmp/{wheel.name}")
        yield root
    finally:
        if not kept:
            shutil.rmtree(folder)


def install(root: Path, wheel: str) -> None:
    """Install torch and the wheel; the CPU build of torch, or the default one if no index has that."""
    assert enter(root, "python3", "-m", "venv", "/opt/venv").returncode == 0
    pip = ("pip", "install", "--quiet", "--only-binary=torch", "--constraint=/tmp/constraints.txt")
    version = torch_version()
    done = enter(root, *pip, "--retries=0", f"--extra-index-url={CPU_INDEX}", f"torch=={version}+cpu")
    if done.returncode:
        done = enter(root, *pip, f"torch=={version}")
    assert done.returncode == 0, done.stderr[-4000:]
    done = enter(root, *pip, "--force-reinstall", "--no-deps", wheel)
    assert done.returncode == 0, done.stderr[-4000:]
    done = enter(root, *pip, wheel)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_demo_runs_on_a_bare_debian_13(trixie: Path) -> None:
    assert enter(trixie, "python", "--version").stdout.startswith("Python 3.13")
    assert enter(trixie, "sh", "-c", "command -v cc gcc g++").stdout == ""
    shutil.rmtree(trixie / "root" / "demo", ignore_errors=True)
    run = ("--run-dir", "/root/demo")
    few = (f"train.steps={STEPS}", "sample.steps=5")
    done = enter(
        trixie, "deepspeed", "--num_gpus", "2", "--module", "sdit.cli.train", "--ds_config", "zero1", *run, *few
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    last = json.loads((trixie / "root" / "demo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    done = enter(trixie, "sdit", "demo", *run)
    assert done.returncode == 65 and "train longer" in done.stderr, done  # so few steps draw no digits
    assert all((trixie / "root" / "demo" / "demo" / name).stat().st_size for name in ("grid.png", "routing.png"))
    assert enter(trixie, "sdit", "report", "/root/demo").returncode == 0
