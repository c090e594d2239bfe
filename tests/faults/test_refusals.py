"""What cannot run is refused before any rank starts, in one line, with a code that no scheduler retries."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdit.config import Config
from sdit.errors import ConfigError, ExitCode
from sdit.train.resume import compare_configs
from tests.distributed.harness import ROOT, rank_environments
from tests.faults.ranks import start_fake

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
PROMPT_CPU_SECONDS = 2.0


def refuse(world: int, run_dir: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit code, output and CPU seconds of rank 0 of a command that must not start anything."""
    command = [
        sys.executable,
        str(ROOT / "launcher" / "train.py"),
        "--config",
        str(TINY),
        "--run-dir",
        str(run_dir),
        *arguments,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        command, env=rank_environments(world)[0], capture_output=True, text=True, timeout=60, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result.returncode, result.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("world", "override", "words"),
    [
        (3, "train.steps=2", "train.global_batch: 32 is not a multiple of 3 ranks; nearest legal: 30, 33"),
        (1, "train.stepz=2", "train.stepz: unknown key; did you mean train.steps?"),
        (1, "supervise.restarts=-1", "supervise.restarts: -1"),
    ],
)
def test_impossible_job_is_refused_in_seconds(tmp_path: Path, world: int, override: str, words: str) -> None:
    code, output, seconds = refuse(world, tmp_path / "run", override)
    assert code == ExitCode.CONFIG and words in output and len(output.splitlines()) == 1, output
    assert seconds < PROMPT_CPU_SECONDS and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing to refuse")
def test_gpu_that_is_asked_for_and_absent_is_refused(tmp_path: Path) -> None:
    code, output, _ = refuse(1, tmp_path / "run", "parallel.device=cuda")
    assert code == ExitCode.CONFIG, output
    assert re.search(
        r"^error: parallel.device: cuda, but torch .* sees no GPU on host .*; legal: auto, cpu", output, re.M
    )
    assert "restart" not in output and "Traceback" not in output


def test_read_only_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        with start_fake(1, tmp_path / "disk") as ranks:
            assert ranks.codes() == [ExitCode.CONFIG]
        assert "cannot be written (Read-only file system)" in ranks.output
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def changed(**sections: object) -> dict:
    return Config.model_validate({**Config().model_dump(), **sections}).model_dump(mode="json")


def test_resume_with_another_length_or_learning_rate_is_allowed_and_told() -> None:
    changes = compare_configs(changed(), changed(train={"steps": 7}, optimizer={"learning_rate": 0.5}), "here")
    assert changes == ["optimizer.learning_rate: 0.0001 -> 0.5", "train.steps: None -> 7"]


@pytest.mark.parametrize(
    "sections",
    [{"seed": 1}, {"model": {"depth": 3}}, {"data": {"streams": 3}}, {"diffusion": {"schedule": "cosine"}}],
    ids=str,
)
def test_resume_as_another_run_is_refused(sections: dict) -> None:
    with pytest.raises(
        ConfigError, match=r"disagrees with .* of the checkpoint here; legal: the same value, or another run_dir"
    ):
        compare_configs(changed(), changed(**sections), "here")
