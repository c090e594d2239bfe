"""The resume law: a run that was killed or stopped and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from sdit.errors import ExitCode
from tests.distributed.forks import fork_script
from tests.distributed.harness import case, metrics_of, numbers_of, rank_environments, tensors_of, train_together
from tests.faults.ranks import LAUNCHER, is_gone, train_words

TINY = Path(__file__).with_name("tiny.yaml")
STEPS, BATCH, HALF = 40, 64, 20  # 2,560 images: the first epoch of 1,797 ends inside step 29
SETTINGS = (f"train.steps={STEPS}", f"train.global_batch={BATCH}", "checkpoint.every_steps=5", "checkpoint.keep_last=9")
STATE = ("weight", "ema", "exp_avg", "exp_avg_sq")
PROMPT_SECONDS = 120.0
Ranks = Sequence[subprocess.Popen] | Sequence[ForkServerProcess]


def checkpoint_at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"images-{step * BATCH:012d}"


def start(world: int, run_dir: Path) -> list[subprocess.Popen]:
    """The command a user gives, once per rank."""
    command = [sys.executable, str(LAUNCHER), *train_words(run_dir, TINY), *SETTINGS]
    with run_dir.with_suffix(".log").open("a") as log:
        return [subprocess.Popen(command, env=env, stdout=log, stderr=log) for env in rank_environments(world)]


def fork(world: int, run_dir: Path) -> list[ForkServerProcess]:
    """The same without supervisors and without the time of the imports."""
    words, log = [*train_words(run_dir, TINY), *SETTINGS, "supervise.enabled=false"], run_dir.with_suffix(".log")
    return [fork_script(LAUNCHER, words, env, log) for env in rank_environments(world)]


def await_checkpoint(ranks: Ranks, path: Path) -> None:
    deadline = time.monotonic() + PROMPT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert not any(is_gone(rank.pid) for rank in ranks), path.parents[1].with_suffix(".log").read_text()[-3000:]
        time.sleep(0.002)


def exit_code(rank: subprocess.Popen | ForkServerProcess) -> int | None:
    """The exit code of a rank, when it has ended."""
    if isinstance(rank, subprocess.Popen):
        return rank.wait(PROMPT_SECONDS)
    rank.join(PROMPT_SECONDS)
    return rank.exitcode


def kill_after(ranks: Ranks, run_dir: Path, step: int) -> None:
    """SIGKILL every rank of a run when the checkpoint of `step` is there."""
    try:
        await_checkpoint(ranks, checkpoint_at(run_dir, step))
    finally:
        for rank in ranks:
            rank.kill()
    assert {exit_code(rank) for rank in ranks} == {-signal.SIGKILL}
    assert not checkpoint_at(run_dir, STEPS).exists(), "the run ended before it was killed"


def terminate_one(world: int, run_dir: Path, step: int) -> list[int | None]:
    """Start a run, SIGTERM its last rank when the checkpoint of `step` is there, return all exit codes."""
    ranks = start(world, run_dir)
    try:
        await_checkpoint(ranks, checkpoint_at(run_dir, step))
        ranks[-1].terminate()
        return [exit_code(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def branch(straight: Path, run_dir: Path) -> Path:
    """A run directory that holds what `straight` had written half-way."""
    shutil.copytree(checkpoint_at(straight, HALF), checkpoint_at(run_dir, HALF))
    half = [record for record in metrics_of(straight) if record["step"] <= HALF]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`straight-N` on N ranks; `killed-N` killed twice; `stopped-2` by SIGTERM; `1-to-2`, `2-to-1` re-laid.

    `killed-2` is first killed with its supervisors. The other kills strike ranks without supervisors.
    """
    folder = tmp_path_factory.mktemp("resume")
    for world in (1, 2):
        train_together(world, [case(folder / f"straight-{world}", TINY, *SETTINGS, stage=1)], folder)
        killed = folder / f"killed-{world}"
        kill_after(start(world, killed) if world == 2 else fork(world, killed), killed, 10)
        kill_after(fork(world, killed), killed, 30)
    codes = terminate_one(2, folder / "stopped-2", 10)
    (folder / "codes.json").write_text(json.dumps(codes))
    (folder / "stopped-at.json").write_text(json.dumps(max(r["step"] for r in metrics_of(folder / "stopped-2"))))
    for world in (1, 2):
        other = 3 - world
        moved = branch(folder / f"straight-{other}", folder / f"{other}-to-{world}")
        cases = [
            case(folder / f"killed-{world}", TINY, *SETTINGS, stage=1),
            case(moved, TINY, *SETTINGS, "checkpoint.resume=must", stage=2),
        ]
        if world == 2:
            cases.append(case(folder / "stopped-2", TINY, *SETTINGS, "checkpoint.resume=must", stage=1))
        train_together(world, cases, folder)
    return folder


def assert_same_run(actual: Path, expected: Path) -> None:
    for kind in STATE:
        want, got = tensors_of(expected, kind), tensors_of(actual, kind)
        assert want.keys() == got.keys() and want
        different = [name for name in want if not torch.equal(want[name], got[name])]
        assert not different, (kind, different)
    curves = [numbers_of(run) for run in (expected, actual)]
    assert curves[0] == curves[1]
    assert [record["step"] for record in curves[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("world", [1, 2])
def test_run_killed_twice_equals_undisturbed_run_bit_for_bit(runs: Path, world: int) -> None:
    assert_same_run(runs / f"killed-{world}", runs / f"straight-{world}")


def test_sigterm_on_one_rank_stops_all_at_one_step_and_asks_for_requeue(runs: Path) -> None:
    assert json.loads((runs / "codes.json").read_text()) == [ExitCode.REQUEUE, ExitCode.REQUEUE]
    stopped_at = json.loads((runs / "stopped-at.json").read_text())
    assert 10 <= stopped_at < STEPS and checkpoint_at(runs / "stopped-2", stopped_at).is_dir()


def test_run_stopped_by_sigterm_equals_undisturbed_run_bit_for_bit(runs: Path) -> None:
    assert_same_run(runs / "stopped-2", runs / "straight-2")


@pytest.mark.parametrize("change", ["1-to-2", "2-to-1"])
def test_resume_on_other_ranks_and_zero_stage_follows_the_loss_curve(runs: Path, change: str) -> None:
    expected, actual = metrics_of(runs / f"straight-{change[0]}"), metrics_of(runs / change)
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    for want, got in zip(expected, actual, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5), want["step"]
        assert got["images_seen"] == want["images_seen"]


@pytest.mark.slow
def test_resume_with_experts_spread_otherwise_follows_the_loss_curve(tmp_path: Path) -> None:
    """Stopped on 4 ranks with EP 2 and resumed on 2 ranks with EP 1, and the other way round; ZeRO 1 becomes 2."""
    experts = {4: "parallel.expert=2", 2: "parallel.expert=1"}
    for world in (4, 2):
        train_together(
            world, [case(tmp_path / f"straight-{world}", TINY, *SETTINGS, experts[world], stage=1)], tmp_path
        )
    for world, other in ((4, 2), (2, 4)):
        moved = branch(tmp_path / f"straight-{other}", tmp_path / f"{other}-to-{world}")
        settings = (*SETTINGS, experts[world], "checkpoint.resume=must")
        train_together(world, [case(moved, TINY, *settings, stage=2)], tmp_path)
        expected, actual = metrics_of(tmp_path / f"straight-{other}"), metrics_of(moved)
        assert [r["images_seen"] for r in actual] == [BATCH * step for step in range(1, STEPS + 1)]
        for want, got in zip(expected, actual, strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5), (moved.name, want["step"])
