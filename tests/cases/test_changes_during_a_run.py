"""What changes below a run while it trains: its shards, the machine's shared memory, and the layout under bf16."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdit.cli.prepare import main as prepare
from sdit.errors import ExitCode
from sdit.observe.metrics_file import read_metrics
from tests.cases.commands import fork
from tests.distributed.harness import ROOT, case, numbers_of, rank_environments, tensors_of, train_together
from tests.faults.ranks import eventually, start_real, train_words

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as 29 shards: more than the loader keeps open."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert prepare(["digits", "--out", str(folder), "--samples-per-shard", "64", "--jobs", "1"]) == ExitCode.DONE
    return folder


def settings(folder: Path) -> tuple[str, ...]:
    return (
        "data.source=shards",
        f"data.path={folder}",
        "data.workers=1",
        "train.steps=64",  # more than an epoch
        "checkpoint.every_steps=4",
    )


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_together(1, [case(run, TINY, *settings(shards))], run.parent)
    return run


def swap(path: Path) -> None:
    """Put another shard of the same number of samples in its place, as a second `prepare` with another seed would."""
    other = path.with_name("shard-000000.tar")
    shutil.copy(other if other != path else path.with_name("shard-000001.tar"), path)


def block(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another shard": (swap, "sha256"),
    "cut": (lambda path: os.truncate(path, 512), "512 bytes"),
    "deleted": (lambda path: path.unlink(), "No such file"),
    "a FIFO": (block, "is a FIFO"),
}
REPEATED = ("cut", "deleted")  # tests/unit/data/test_shards.py reads such shards, too


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in REPEATED else kind for kind in CHANGES]
)
def test_shards_that_change_end_the_run_and_can_be_put_back(
    tmp_path: Path, shards: Path, undisturbed: Path, kind: str
) -> None:
    """A shard that is no longer the indexed one is never used. With the shards back, the run ends with the same bits."""
    change, reason = CHANGES[kind]
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    with start_real(1, run, TINY, *settings(data)) as ranks:
        eventually(lambda: read_metrics(run))
        for path in data.glob("*.tar"):
            change(path)
        assert ranks.codes() == [ExitCode.DATA]
    (line,) = ranks.fatal
    assert ".tar" in line and reason in line
    shutil.rmtree(data)
    shutil.copytree(shards, data)
    done = fork("train", *train_words(run, TINY), *settings(data), "supervise.enabled=false")
    assert done.status == ExitCode.DONE, done.err
    assert numbers_of(run) == numbers_of(undisturbed)
    for state in KINDS:
        want, got = tensors_of(undisturbed, state), tensors_of(run, state)
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


IN_FULL_MEMORY = """
mount -t tmpfs -o size=64k tmpfs /dev/shm && cat /dev/zero > /dev/shm/full 2>/dev/null
exec "$@"
"""


@pytest.mark.cluster
def test_full_shared_memory_changes_nothing(tmp_path: Path) -> None:
    """A full /dev/shm, as in a container with `--shm-size` too small: ranks, loader and metrics do not use it."""
    for world, folder in ((2, "plain"), (2, "full")):
        words = [
            sys.executable,
            str(ROOT / "launcher" / "train.py"),
            "--config",
            str(TINY),
            "--run-dir",
            str(tmp_path / folder),
        ]
        before = ["unshare", "--mount", "bash", "-c", IN_FULL_MEMORY, "bash"] if folder == "full" else []
        processes = [
            subprocess.Popen(
                [*before, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for environment in rank_environments(world)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [ExitCode.DONE] * world, outputs
    assert numbers_of(tmp_path / "full") == numbers_of(tmp_path / "plain")


LAYOUTS = {
    "small": ((1, 0, 1), (2, 1, 2), (1, 2, 1)),
    "large": ((2, 2, 1), (4, 2, 4), (4, 0, 2), (1, 1, 1)),
}  # ranks, ZeRO, EP
STEPS = 4


@pytest.mark.parametrize("layouts", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_layout_changes_under_bf16(tmp_path: Path, layouts: str) -> None:
    """bf16: a run that changes its ranks, ZeRO stage and EP every four steps follows the fp32 run of one rank."""
    run, plain, steps = tmp_path / "run", tmp_path / "plain", STEPS * len(LAYOUTS[layouts])
    train_together(1, [case(plain, TINY, f"train.steps={steps}")], tmp_path)
    for number, (world, stage, experts) in enumerate(LAYOUTS[layouts], start=1):
        keys = ("train.precision=bf16", f"parallel.expert={experts}", f"train.steps={STEPS * number}")
        train_together(world, [case(run, TINY, *keys, stage=stage)], tmp_path)
    got, want = read_metrics(run), read_metrics(plain)
    assert [record["step"] for record in got] == [record["step"] for record in want] == list(range(1, steps + 1))
    # bf16 keeps 8 bits: weights and activations carry 2^-9 relative error, and losses of order 1 average many of them.
    for record, exact in zip(got, want, strict=True):
        assert record["loss"] == pytest.approx(exact["loss"], rel=2**-7), record["step"]
