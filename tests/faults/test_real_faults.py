"""Faults in real runs of real ranks: whatever happens, the run ends as the undisturbed one does, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from sdit.checkpoint.find import find_checkpoint
from sdit.data.encoders import png_encoder
from sdit.data.prepare import prepare
from sdit.data.sources import digits_source
from sdit.errors import ExitCode
from sdit.supervise.heartbeat import Phase
from tests.distributed.harness import ROOT, case, fork_ranks, metrics_of, numbers_of, tensors_of, train_together
from tests.faults.ranks import FAULTY_LAUNCHER, Ranks, eventually, newest_step, start_real, train_words

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
STEPS, BATCH = 20, 32
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=5", "data.workers=1")
DEADLINES = ("supervise.step_seconds=20.0", "supervise.first_step_seconds=60.0")
STATE = ("weight", "ema", "exp_avg", "exp_avg_sq")
PRODUCT, SOURCES = ("sdit", "launcher", "docker", "cluster", "configs"), (".py", ".sh", ".sbatch", ".yaml", ".json")
FAULTS = re.compile(r"--fault|FaultyEngine|SDIT_FAULT", re.IGNORECASE)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("faults")
    background = case(folder / "background", TINY, *SETTINGS, "checkpoint.asynchronous=true", stage=1)
    train_together(2, [case(folder / "straight", TINY, *SETTINGS, stage=1), background], folder)
    return folder / "straight"


def assert_same_run(actual: Path, expected: Path) -> None:
    for kind in STATE:
        want, got = tensors_of(expected, kind), tensors_of(actual, kind)
        assert want.keys() == got.keys() and want
        assert [name for name in want if not torch.equal(want[name], got[name])] == [], kind
    curves = [numbers_of(run) for run in (expected, actual)]
    assert curves[0] == curves[1]


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def run_with(run: Path, *faults: str, settings: tuple[str, ...] = ()) -> Ranks:
    return start_real(2, run, TINY, *SETTINGS, *DEADLINES, *settings, faults=faults)


def train_unsupervised(run: Path, *words: str, ends: tuple[int, int] = (ExitCode.DONE, ExitCode.DONE)) -> None:
    """Train on two ranks that fork and end with `ends`. Faults are words such as --fault=nan_loss@1:6."""
    words = (*train_words(run, TINY), *SETTINGS, *words, "supervise.enabled=false")
    ranks = fork_ranks(2, FAULTY_LAUNCHER, words)
    assert tuple(rank.returncode for rank in ranks) == ends, [rank.stdout for rank in ranks]


def test_bad_steps_and_a_kill_leave_no_trace_in_the_run(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with run_with(run, "nan_loss@1:3", "nan_grad@0:5", "kill@1:10") as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    (line,) = ranks.fatal
    assert f"rank 1, host {socket.gethostname()}, step 10, phase step: killed by SIGKILL" in line
    assert "restart 1 of 3 from images-000000000256" in line
    assert [event["step"] for event in events(run, "skipped_step")] == [3, 5]
    assert_same_run(run, straight)


def test_checkpoints_written_in_the_background_are_those_written_in_place(straight: Path) -> None:
    background = straight.with_name("background")
    assert_same_run(background, straight)
    written, expected = ({e["text"].split()[0] for e in events(run, "checkpoint")} for run in (background, straight))
    assert written == expected
    for folder in (straight / "checkpoints").glob("images-*"):
        for shard in folder.glob("shard-*"):
            assert (background / "checkpoints" / folder.name / shard.name).read_bytes() == shard.read_bytes()


def test_steps_that_stay_bad_end_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    with run_with(tmp_path / "run", "nan_loss@1:6!") as ranks:
        assert ranks.codes() == [ExitCode.DATA] * 2
    assert "train.max_bad_steps: 3 steps in a row" in ranks.output and "images-000000000128" in ranks.output
    assert len(ranks.fatal) == 1


ROLL = ("train.max_bad_steps=1", "train.rollbacks=2", "checkpoint.keep_last=9")


def test_bad_step_rolls_the_run_back_and_leaves_its_samples_out(tmp_path: Path) -> None:
    """NaN in the seventh step: back to the checkpoint of the fourth, samples 128..223 are never trained on."""
    run, killed = tmp_path / "run", tmp_path / "killed"
    train_unsupervised(run, "--fault=nan_loss@1:6", *ROLL)
    (event,) = events(run, "rolled_back")
    assert event["step"] == 4 and "back to images-000000000128, samples 128..223 are left out" in event["text"]
    assert [record["step"] for record in metrics_of(run)] == list(range(1, STEPS + 1))
    found = find_checkpoint(run)
    assert found.manifest["clock"] == {"images_seen": STEPS * BATCH, "steps": STEPS, "left_out": [[128, 96]]}
    faults = ("--fault=nan_loss@1:6", "--fault=kill@0:14")
    train_unsupervised(killed, *faults, *ROLL, ends=(-signal.SIGKILL, ExitCode.CRASH))
    train_unsupervised(killed, *ROLL)  # what was left out stays left out
    assert_same_run(killed, run)


@pytest.mark.slow
def test_run_that_stays_bad_after_its_rollbacks_ends(tmp_path: Path) -> None:
    with run_with(tmp_path / "run", "nan_loss@1:6!", settings=ROLL) as ranks:
        assert ranks.codes() == [ExitCode.DATA] * 2
    assert len(events(tmp_path / "run", "rolled_back")) == 2
    assert "train.max_bad_steps: 1 steps in a row" in ranks.output and "images-000000000128" in ranks.output


@pytest.mark.slow
def test_loss_spike_rolls_the_run_back_on_request(tmp_path: Path) -> None:
    # The bound of an untrained variance spikes early, which widens the band for a while: half a deviation is still far.
    longer = ("train.steps=130", "train.rollback_on_spike=true", "train.rollbacks=1", "train.spike_deviations=0.5")
    with run_with(tmp_path / "run", "spike@0:121", settings=longer) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    (event,) = events(tmp_path / "run", "rolled_back")
    assert event["step"] == 120 and f"samples {120 * BATCH}..{122 * BATCH - 1} are left out" in event["text"]
    assert metrics_of(tmp_path / "run")[-1]["step"] == 130


def test_stop_cuts_pauses_short_and_the_next_start_makes_up_for_them(tmp_path: Path) -> None:
    """The held-out loss takes 50 batches, the last grid 100 sampler steps: stopped in the middle of both, nothing lacks.

    The last start needs no supervisor, because it is not disturbed.
    """
    held_out, run = tmp_path / "held-out", tmp_path / "run"
    prepare(digits_source(), png_encoder(), held_out, 256, 1, False)
    settings = (
        f"validation.every_images={6 * BATCH}", f"validation.path={held_out}", "validation.images=1600", "parallel.expert=2",
        "sample.sampler=ddpm", "sample.steps=100", "sample.images_per_class=8",
    )  # fmt: skip
    with run_with(run, settings=settings) as ranks:
        eventually(lambda: ranks.place(1) == (Phase.SAMPLE, 6))  # the held-out loss of the sixth step is under way
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2, ranks.output
    stopped_at = metrics_of(run)[-1]
    assert "validation_loss" not in stopped_at and stopped_at["step"] == 6
    assert find_checkpoint(run).manifest["clock"]["steps"] == stopped_at["step"]
    with run_with(run, settings=settings) as ranks:
        eventually(lambda: list((run / "routing").glob("*.npz")))  # the map is written, the grid is being drawn
        ranks.send(0, signal.SIGUSR1)
        assert ranks.codes() == [ExitCode.REQUEUE] * 2, ranks.output
    assert len(metrics_of(run)) == STEPS and not (run / "samples").exists()
    assert find_checkpoint(run).manifest["clock"]["steps"] == STEPS
    train_unsupervised(run, *settings)
    undisturbed = tmp_path / "undisturbed"
    train_unsupervised(undisturbed, *settings)
    assert_same_run(run, undisturbed)
    curves = [[record.get("validation_loss") for record in metrics_of(folder)] for folder in (run, undisturbed)]
    assert curves[0] == curves[1] and sum(value is not None for value in curves[0]) == STEPS // 6 + 1
    grids = [list((folder / "samples").iterdir()) for folder in (run, undisturbed)]
    assert len(grids[0]) == 1 and grids[0][0].read_bytes() == grids[1][0].read_bytes()
    assert [
        "validation of 192" in events(run, "made_up")[0]["text"],
        "samples of" in events(run, "made_up")[1]["text"],
    ] == [True] * 2


def test_faults_exist_in_tests_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The product has no option for faults, and none of its modules knows a fault."""
    from sdit.cli.train import main

    monkeypatch.setenv("SDIT_FAULTS", "1")  # what allowed the option once
    with pytest.raises(SystemExit) as end:
        main(["--fault", "kill@0:1", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == ExitCode.USAGE and "--fault" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    product = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    assert len(product) > 100
    assert [path for path in product if FAULTS.search(path.read_text())] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["stop@1:6", "gil@0:6", "hang@1:6", "exit@0:6", "exception@1:6", "oom@1:6", "kill@0:6", "kill@1:0"]
)
def test_run_survives_any_single_fault_bit_for_bit(straight: Path, tmp_path: Path, fault: str) -> None:
    run = tmp_path / "run"
    with run_with(run, fault) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    (line,) = ranks.fatal
    rank, _, step = fault.partition("@")[2].partition(":")
    assert f"rank {rank}, host {socket.gethostname()}, step {step}" in line, line
    assert_same_run(run, straight)


@pytest.mark.slow
def test_slow_rank_is_named_in_the_metrics(tmp_path: Path) -> None:
    with run_with(
        tmp_path / "run", *(f"slow@1:{step}" for step in range(STEPS)), settings=("train.log_every_steps=10",)
    ) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * 2, ranks.output
    for record in metrics_of(tmp_path / "run"):
        assert record["slowest_rank"] == 1
        assert record["rank_step_seconds_p99"] > record["rank_step_seconds_p50"] > 0.1  # p50 of two ranks: their mean


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kills_at_random_instants_while_saving_every_step_lose_nothing(
    straight: Path, tmp_path: Path, world: int
) -> None:
    run, chance = tmp_path / "run", random.Random(world)
    settings = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", "supervise.restarts=12")
    for _ in range(5):  # SIGKILL of the whole job
        before = newest_step(run)
        with start_real(world, run, TINY, *SETTINGS[:1], *settings) as ranks:
            eventually(lambda before=before: newest_step(run) > before)
            time.sleep(chance.random() * 0.02)
            for rank in range(world):
                ranks.send(rank, signal.SIGKILL)
    with start_real(world, run, TINY, *SETTINGS[:1], *settings) as ranks:
        assert ranks.codes() == [ExitCode.DONE] * world, ranks.output
    if world == 2:
        assert_same_run(run, straight)


@pytest.mark.slow
def test_ten_kills_at_random_instants_in_one_supervised_run_on_four_ranks(tmp_path: Path) -> None:
    """200 steps, ZeRO 1, EP 2: ends by itself, with the undisturbed run's weights and every image once."""
    run, chance = tmp_path / "run", random.Random(7)
    settings = (
        "train.steps=200",
        "checkpoint.every_steps=5",
        "checkpoint.keep_last=2",
        "supervise.restarts=10",
        "parallel.expert=2",
    )
    train_together(4, [case(tmp_path / "straight", TINY, *settings, stage=1)], tmp_path)
    kills = 0
    with start_real(4, run, TINY, *settings) as ranks:
        while kills < 10 and all(process.poll() is None for process in ranks.processes):
            before = newest_step(run)
            goal = BATCH * (20 * kills + chance.randrange(1, 15))
            eventually(lambda before=before, goal=goal: newest_step(run) > max(before, goal - 1))
            time.sleep(chance.random() * 0.1)

            os.kill(ranks.child_pid(chance.randrange(4)), signal.SIGKILL)
            kills += 1
            eventually(lambda kills=kills: len(ranks.fatal) >= kills)
        assert ranks.codes(seconds=300) == [ExitCode.DONE] * 4, ranks.output
    assert kills == 10 and len(ranks.fatal) == 10
    assert [record["images_seen"] for record in metrics_of(run)] == [BATCH * step for step in range(1, 201)]
    assert_same_run(run, tmp_path / "straight")
