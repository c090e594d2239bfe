"""Start-up: manuals and refusals come at once, without torch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdit import cli
from tests.cases.commands import ROOT, TINY, start

SECONDS = 1.0  # of CPU time, which other load on the machine does not change
TRIES = 3


def cpu_seconds(*words: object, status: int) -> float:
    """Return the least CPU time of a launcher that ends with `status`, over a few starts."""
    found = []
    for _ in range(TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start(*words).status == status
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if found[-1] < SECONDS:
            break
    return min(found)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_comes_within_a_second(verb: str) -> None:
    """Start-up: `--help` of each launcher takes less than a second."""
    assert cpu_seconds(verb, "--help", status=0) < SECONDS


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("train", "--config", TINY, "train.stpes=3"), 78),
        (("train", "--config", TINY, "train.global_batch=7", "train.micro_batch=3"), 78),
        (("train", "--config", "no-such.yaml"), 78),
        (("train", "--ds_config", "no-such.json"), 78),
        (("train", "--cofnig", "x"), 64),
        (("plan", TINY, "train.steps=many"), 78),
        (("submit", "--config", TINY, "--run-dir", "r", "train.stpes=3"), 78),
        (("sample", "--checkpoint", "x"), 64),
        (("evaluate", "--reference", "x"), 64),
        (("export", "--checkpoint", "x", "--out", "x.bin"), 64),
        (("report",), 64),
    ],
)
def test_a_refusal_comes_within_a_second(words: tuple[object, ...], status: int) -> None:
    """Start-up: a refused config or command line takes less than a second."""
    assert cpu_seconds(*words, status=status) < SECONDS


def test_a_refused_config_imports_no_torch(tmp_path: Path) -> None:
    """Start-up: a refused config is refused before torch, numpy and DeepSpeed are imported."""
    code = (
        "import sys; from sdit.cli.train import main\n"
        f"code = main(['--config', {str(TINY)!r}, '--run-dir', {str(tmp_path / 'r')!r}, 'train.stpes=3'])\n"
        "print(code, [name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "78 []\n"


def test_a_rank_and_its_parent_import_what_they_need(tmp_path: Path) -> None:
    """Start-up: the supervisor of a training rank loads no torch, numpy or DeepSpeed; the rank loads no compiler."""
    command = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(TINY), "train.steps=100000"]
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # both list their imports on stderr
    with (tmp_path / "imports").open("w") as imports:
        supervisor = subprocess.Popen(
            [*command, "--run-dir", str(tmp_path / "run")], stderr=imports, cwd=tmp_path, env=environment
        )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert supervisor.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (rank,) = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in (supervisor.pid, rank)]
    finally:
        supervisor.terminate()
        status = supervisor.wait(120)
    assert status == 75
    assert [[name in maps for name in ("libtorch", "numpy")] for maps in loaded] == [[False, False], [True, True]]
    imported = (tmp_path / "imports").read_text().split()
    assert "deepspeed.runtime.zero.muon.original_muon" in imported and "torch._inductor.compile_fx" not in imported


def test_sampling_imports_no_trainer() -> None:
    """Start-up: `sdit sample` and `sdit evaluate` load neither DeepSpeed nor torch's compiler, also to build a model."""
    code = (
        "import sys, sdit.evaluate.sample_cache, sdit.evaluate.generate\n"
        "from sdit.model import build_model\n"
        "build_model({'depth': 1, 'width': 32, 'heads': 2, 'patch_size': 4, 'input_size': 8})\n"
        "print([x for x in ('deepspeed', 'torch._dynamo') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
