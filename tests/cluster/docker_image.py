"""Fixtures: a Docker engine of the tests' own, and the project's image built in it.

No registry is asked: the base image is a `debootstrap` of Debian, and wheels come from where this machine's pip gets them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.docker_engine import IMAGE, Engine
from tests.distributed.harness import ROOT

BASE_IMAGE = "sdit-base:bookworm"
WHEELS = ROOT / "docker" / "wheels"
BUILD_SECONDS = 900.0


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine; SDIT_TEST_DOCKER names a folder that is kept, so that the next run finds the image's layers."""
    kept = os.environ.get("SDIT_TEST_DOCKER")
    folder = Path(kept or tempfile.mkdtemp(prefix="sdit-docker-", dir="/var/tmp"))  # images are too large for a tmpfs
    folder.mkdir(parents=True, exist_ok=True)
    running = Engine(folder)
    try:
        yield running
    finally:
        running.close()
        if not kept:
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of the CPU image, built from this tree."""
    if engine.run("image", "inspect", BASE_IMAGE, check=False).returncode:
        _import_debian(engine)
    _fill_wheelhouse()
    arguments = ("--network=host", f"--build-arg=BASE_IMAGE={BASE_IMAGE}", "--build-arg=REVISION=0123abc")
    engine.run("build", *arguments, "--file=docker/Dockerfile", f"--tag={IMAGE}", str(ROOT), seconds=BUILD_SECONDS)
    return IMAGE


def _import_debian(engine: Engine) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder], check=True, timeout=BUILD_SECONDS)
        archive = f"{folder}.tar"
        caches = ("--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*")
        try:
            subprocess.run(["tar", "--create", f"--file={archive}", *caches, f"--directory={folder}", "."], check=True)
            engine.run("import", archive, BASE_IMAGE)
        finally:
            Path(archive).unlink(missing_ok=True)


def _fill_wheelhouse() -> None:
    """All wheels of the image, of the versions in constraints.txt; those of an earlier run are kept while nothing has changed."""
    version, index = torch_version(), "https://download.pytorch.org/whl/cpu"
    sources = (ROOT / "constraints.txt", ROOT / "pyproject.toml")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + version.encode()).hexdigest()
    stamp = WHEELS / "made-from"
    if stamp.exists() and stamp.read_text() == digest:
        return
    shutil.rmtree(WHEELS, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", f"--wheel-dir={WHEELS}", "--constraint=constraints.txt"]
    for extra in (
        (),
        (f"--extra-index-url={index}",),
    ):  # as `make install`: PyTorch's own index only where the usual has none
        command = [*pip, *extra, f"torch=={version}+cpu", "."]
        result = subprocess.run(command, cwd=ROOT, timeout=BUILD_SECONDS, capture_output=True, text=True)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stderr[-4000:]
    for own in WHEELS.glob("sdit-*.whl"):
        own.unlink()
    stamp.write_text(digest)


def torch_version() -> str:
    """Return the version of torch that the Makefile installs."""
    makefile = (ROOT / "Makefile").read_text().splitlines()
    return next(line.split()[-1] for line in makefile if line.startswith("TORCH_VERSION"))
