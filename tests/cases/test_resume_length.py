"""A run's length and schedule are fixed in images when it starts, and a resume says in one block what it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdit.checkpoint.files import write_manifest
from sdit.clock import learning_rate_factor
from sdit.report.record import read_runs
from tests.distributed.harness import case, metrics_of, train_together

TINY = Path(__file__).parents[1] / "distributed" / "tiny.yaml"
BATCH, STEPS, HALF = 32, 16, 8
LENGTH = BATCH * STEPS
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "optimizer.decay=cosine",
            "optimizer.warmup_images=64", "sample.every_images=192")  # fmt: skip
RESUMES: dict[str, tuple[str, ...]] = {
    "same": (),
    "halved": (f"train.global_batch={BATCH // 2}",),
    "doubled": (f"train.global_batch={BATCH * 2}",),
    "longer": (f"train.steps={STEPS + 4}",),
    "images": ("train.steps=null", f"train.images={LENGTH - 64}"),
    "shorter": (f"train.steps={HALF - 2}", "optimizer.learning_rate=0.5"),
    "older": (f"train.global_batch={BATCH // 2}",),
}


def branch(straight: Path, run_dir: Path) -> Path:
    """A run folder that was stopped at half of `straight`, with a grid that is still to be drawn."""
    name = f"images-{HALF * BATCH:012d}"
    shutil.copytree(straight / "checkpoints" / name, run_dir / "checkpoints" / name)
    half = [record for record in metrics_of(straight) if record["step"] <= HALF]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in half))
    return run_dir


def without_length(run_dir: Path) -> None:
    """Make the checkpoint one of a version that did not store the length, nor a key of today's config."""
    folder = next((run_dir / "checkpoints").glob("images-*"))
    body = json.loads((folder / "manifest.json").read_text())["body"]
    body.pop("length_images", None)
    body["config"]["observe"].pop("wandb")
    write_manifest(folder, body)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The straight run, and one that resumes at its half for each of RESUMES; `twice` changes the batch twice."""
    folder = tmp_path_factory.mktemp("length")
    train_together(1, [case(folder / "straight", TINY, *SETTINGS)], folder)
    for name in RESUMES:
        branch(folder / "straight", folder / name)
    without_length(folder / "older")
    train_together(1, [case(folder / name, TINY, *SETTINGS, *more) for name, more in RESUMES.items()], folder)
    shutil.copytree(folder / "halved", folder / "twice")
    for path in (folder / "twice" / "checkpoints").glob("images-*"):
        if int(path.name[7:]) > 320:
            shutil.rmtree(path)
    train_together(1, [case(folder / "twice", TINY, *SETTINGS, f"train.global_batch={BATCH * 2}")], folder)
    return folder


def start_of(run_dir: Path) -> str:
    """What the last start said."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return str([event["text"] for event in events if event["event"] == "start"][-1])


def steps_of(run_dir: Path) -> list[tuple[int, int]]:
    return [(record["step"], record["images_seen"]) for record in metrics_of(run_dir)]


def test_a_halved_batch_keeps_the_length_in_images(runs: Path) -> None:
    """R2: Halved at half of the run, the batch leaves half of the images: twice as many steps."""
    assert steps_of(runs / "halved")[-1] == (HALF + 2 * (STEPS - HALF), LENGTH)


def test_a_doubled_batch_keeps_the_length_in_images(runs: Path) -> None:
    """R2: Doubled at half of the run, the batch leaves half as many steps; no image more is seen."""
    assert steps_of(runs / "doubled")[-1] == (HALF + (STEPS - HALF) // 2, LENGTH)


def test_a_batch_that_changes_twice_keeps_the_first_length(runs: Path) -> None:
    """R2: The length is that of the first start, whatever the batch was in between."""
    assert steps_of(runs / "twice")[-1][1] == LENGTH


@pytest.mark.parametrize("name", ["halved", "doubled", "twice", "older"])
def test_the_schedule_does_not_jump_when_the_batch_changes(runs: Path, name: str) -> None:
    """R2: The learning rate is the same function of the images seen before and after the change."""
    from sdit.config import load_config

    config = load_config(TINY, SETTINGS).optimizer
    for record in metrics_of(runs / name):
        factor = learning_rate_factor(config, record["images_seen"], LENGTH)
        assert record["learning_rate"] == pytest.approx(config.learning_rate * factor), record["step"]


def test_a_run_of_an_older_version_keeps_its_length(runs: Path) -> None:
    """R2: A checkpoint that states no length has the one of its config, and a key it does not know is no change."""
    assert steps_of(runs / "older")[-1][1] == LENGTH
    assert "wandb" not in start_of(runs / "older")


def test_an_explicit_length_changes_the_run_and_says_so(runs: Path) -> None:
    """R2: Another train.steps or train.images is a new length; both lengths are named."""
    assert steps_of(runs / "longer")[-1] == (STEPS + 4, LENGTH + 4 * BATCH)
    assert f"from {LENGTH} to {LENGTH + 4 * BATCH} images" in start_of(runs / "longer")
    assert steps_of(runs / "images")[-1][1] == LENGTH - 64
    assert f"from {LENGTH} to {LENGTH - 64} images" in start_of(runs / "images")


def test_a_length_that_is_reached_already_is_said(runs: Path) -> None:
    """R2: A run that is shorter than what it has seen ends at once and says why."""
    assert steps_of(runs / "shorter")[-1] == (HALF, HALF * BATCH)
    assert f"{HALF * BATCH} are seen already" in start_of(runs / "shorter")


def test_changes_are_listed_in_one_block(runs: Path) -> None:
    """R2: One block at the start lists every change: old value, new value, and what it does."""
    text = start_of(runs / "shorter")
    block = text[text.index("resume: ") :].splitlines()
    assert block[0].startswith("resume: ") and "settings differ from the checkpoint's" in block[0]
    lines = {line.split(":")[0].strip(): line for line in block[1:]}
    assert block[0].split()[1] == str(len(lines))
    assert f"{STEPS} -> {HALF - 2}" in lines["train.steps"]
    assert "0.001 -> 0.5 (peak learning rate)" in lines["optimizer.learning_rate"]
    assert str(runs / "shorter") in lines["run_dir"]


def test_a_changed_batch_says_what_becomes_of_the_run(runs: Path) -> None:
    """R2: The line of the batch names the length that stays, the steps that remain, and what counts steps."""
    line = next(line for line in start_of(runs / "halved").splitlines() if "train.global_batch" in line)
    assert f"{BATCH} -> {BATCH // 2}" in line and f"stay at {LENGTH} images" in line
    assert f"{2 * (STEPS - HALF)} steps remain" in line and "ema.decay" in line


def test_the_report_knows_the_length(runs: Path) -> None:
    """R2: The report measures progress by the run's length, not by steps times the newest batch."""
    assert {run.total_images for run in read_runs([runs / "halved", runs / "doubled", runs / "twice"])} == {LENGTH}


def test_the_length_is_stored_with_the_checkpoint(runs: Path) -> None:
    """R2: Every checkpoint states the length in images."""
    for folder in (runs / "halved" / "checkpoints").glob("images-*"):
        body: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["body"]
        assert body.get("length_images", LENGTH) == LENGTH


def test_an_unchanged_resume_is_the_same_run(runs: Path) -> None:
    """R2: Without a change the numbers are those of the run that was not stopped."""
    want, got = metrics_of(runs / "straight"), metrics_of(runs / "same")
    assert [record["loss"] for record in got] == [record["loss"] for record in want]
    assert [record["learning_rate"] for record in got] == [record["learning_rate"] for record in want]


def test_no_password_is_listed() -> None:
    """R2: A changed URL is listed without the password that it holds."""
    from sdit.clock import Clock
    from sdit.config import Config
    from sdit.train.resume import Resumed, describe_resume

    change = "observe.pushgateway: 'http://me:hunter22@host:9091' -> None"
    text = describe_resume([change], Resumed(512, 512, 32), Config(), Clock(256, 8))
    assert "observe.pushgateway" in text and "hunter22" not in text


@pytest.mark.parametrize(("old", "new", "drawn"), [(32, 64, False), (64, 32, True)])
def test_a_grid_is_due_by_the_batch_of_the_step_that_was_taken(old: int, new: int, drawn: bool) -> None:
    """R2: After a change of the batch, what the last step owed follows from that step's own size."""
    from dataclasses import replace

    from sdit.clock import Clock
    from sdit.train.catch_up import catch_up
    from tests.unit import test_catch_up

    keeper, seen = test_catch_up.Keeper(), test_catch_up.EVERY + 32  # a grid was due within the last 64 images
    context, sampler = test_catch_up.context_at(Clock(seen, 3), keeper)
    context.state.last_batch, context.state.length_images = old, 10_000
    context = replace(context, run=replace(context.run, batch=replace(context.run.batch, global_batch=new)))
    catch_up(context, test_catch_up.tasks_of(context, sampler), attempt=1)
    assert bool(keeper.drawn) is drawn
