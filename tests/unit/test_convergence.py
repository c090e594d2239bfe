"""The experiment behind the convergence table: pairing, spread, resuming, and that variants differ in nothing but the model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import stages, study, tables
from experiments.stages import Experiment
from experiments.training import (
    StepTimer,
    Turn,
    checkpoint_of,
    flops_per_image,
    is_trained,
    run_config,
    seconds_per_image,
)
from experiments.variants import FULL, QUICK, VARIANTS
from sdit.clock import Clock
from sdit.config import Config
from sdit.errors import DataError, ExitCode
from sdit.model.flops import flops_per_image as planned_flops
from sdit.supervise.heartbeat import Heartbeat
from sdit.train.record import StepRecord

ROOT = Path(__file__).resolve().parents[2]
BINS = 20
FULL_CONFIG = run_config(FULL, "dit", 0, Path("work"), Path("run")).model_dump(mode="json")


def run_of(variant: str, seed: int, loss: float, fid: float | None, seconds: float = 0.005) -> dict:
    """A finished run's result, as small as the tables allow."""
    held_out = {
        "images_seen": 100, "validation_loss": loss, "validation_mse": loss, "validation_images": 8,
        "validation_loss_by_timestep": [loss] * BINS,
    }  # fmt: skip
    facts = {"images": 8, "sampler": "ddim", "steps": 2}
    scores = [] if fid is None else [{"images_seen": 100, "fid": fid, **facts}]
    cost = {
        "wall_seconds_per_image": seconds,
        "cpu_seconds_per_image": 0.005,
        "flops_per_image": 1e8,
        "parameters": 500_000,
    }
    return {"variant": variant, "seed": seed, "held_out": [held_out], "scores": scores, "gates": [], "cost": cost}


@pytest.fixture
def runs() -> tables.Runs:
    # The seeds differ by 1, the variants by 0.1 and 0.3 within a seed: only pairing shows that the second is steadily worse.
    return {
        "dit": {0: run_of("dit", 0, 1.0, 50.0, 0.004), 1: run_of("dit", 1, 2.0, 60.0, 0.010)},
        "switch": {0: run_of("switch", 0, 1.1, 40.0, 0.006), 1: run_of("switch", 1, 2.3, None, 0.015)},
    }


def test_differences_are_taken_within_a_seed(runs: tables.Runs) -> None:
    assert tables.paired(runs, "switch", tables.held_out_loss) == pytest.approx([0.1, 0.3])


def test_the_same_step_has_the_same_time_per_image(runs: tables.Runs, tmp_path: Path) -> None:
    runs["dit-longer"] = {0: run_of("dit-longer", 0, 1.0, 50.0, seconds=0.003)}
    for variant, seeds in runs.items():
        for seed, run in seeds.items():
            (tmp_path / f"{variant}-seed{seed}.json").write_text(json.dumps(run))
    assert tables.relative_time(study.read_runs(tmp_path), "dit-longer") == [1.0]


def test_a_longer_run_takes_longer(runs: tables.Runs) -> None:
    runs["switch"][0]["held_out"][-1]["images_seen"] *= 2
    assert tables.relative_time(runs, "switch") == pytest.approx([3.0, 1.5])


def test_times_are_compared_within_a_seed(runs: tables.Runs) -> None:
    assert tables.relative_time(runs, "switch") == pytest.approx([1.5, 1.5])
    del runs["dit"][0]
    assert tables.relative_time(runs, "switch") == pytest.approx([1.5])


def test_a_seed_without_a_score_has_no_difference(runs: tables.Runs) -> None:
    assert tables.paired(runs, "switch", tables.fid) == pytest.approx([-10.0])
    del runs["dit"][0]
    assert tables.paired(runs, "switch", tables.fid) == []


def test_a_score_of_an_earlier_checkpoint_is_not_the_runs(runs: tables.Runs) -> None:
    run = runs["dit"][0]
    run["scores"][0]["images_seen"] = 50
    assert tables.fid(run) is None


def test_spread_is_that_of_a_sample() -> None:
    assert tables.spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert tables.spread([1.0], 2) == "1.00 (1 seed)"
    assert tables.spread([], 2) == "-"
    assert tables.spread([-1.0, -1.0], 1, "+") == "-1.0 ± 0.0"


def test_results_table_has_a_row_for_each_variant(runs: tables.Runs) -> None:
    lines = tables.results_table(runs).splitlines()
    assert len(lines) == 2 + len(runs)
    assert "+0.2000 ± 0.1414, better in 0 of 2" in lines[3]
    assert "-10.0 (1 seed), better in 1 of 1" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_losses_by_timestep_are_relative_to_the_baseline(runs: tables.Runs) -> None:
    assert tables.timestep_table(runs).splitlines()[2].count("+12.5 ± 3.5") == tables.TIME_PARTS


def test_blocks_are_replaced_and_the_rest_stays() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    filled = study.fill_blocks(text, {"x": "new", "y": "nowhere"})
    assert filled == "a\n<!-- x -->\nnew\n<!-- end x -->\nb\n"
    assert study.fill_blocks(filled, {"x": "new"}) == filled


def test_summary_goes_to_the_front_page_where_it_is_marked(runs: tables.Runs, tmp_path: Path) -> None:
    results, front_page = tmp_path / "results", tmp_path / "FRONT.md"
    results.mkdir()
    for variant, seeds in runs.items():
        for seed, run in seeds.items():
            run["config"] = FULL_CONFIG
            (results / f"{variant}-seed{seed}.json").write_text(json.dumps(run))
    front_page.write_text("no marks\n")
    assert front_page not in study.write_study(tmp_path, front_page)
    front_page.write_text("# x\n<!-- convergence -->\n<!-- end convergence -->\n")
    assert front_page in study.write_study(tmp_path, front_page)
    assert tables.summary_table(runs) in front_page.read_text()


def test_results_of_two_experiments_are_not_put_in_one_table(runs: tables.Runs) -> None:
    for seeds in runs.values():
        for seed, run in seeds.items():
            run["config"] = {**FULL_CONFIG, "seed": seed, "model": {"variant": run["variant"]}}
    study.check_alike(runs)
    runs["switch"][1]["config"]["optimizer"] = {**FULL_CONFIG["optimizer"], "learning_rate": 1.0}
    with pytest.raises(DataError, match=r"switch-seed1\.json: has optimizer\.learning_rate 1\.0, dit-seed0\.json"):
        study.check_alike(runs)


def test_no_results_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result of a finished run"):
        study.write_study(tmp_path)


def test_variants_differ_in_the_model_and_its_prior_alone(tmp_path: Path) -> None:
    def shared(variant: str) -> dict:
        config = run_config(FULL, variant, 0, tmp_path, tmp_path / "run").model_dump()
        config.pop("prior")
        for key in ("variant", "experts"):
            config["model"].pop(key)
        if variant == "dit-longer":
            assert config["train"].pop("images") > FULL_CONFIG["train"]["images"]
            config["train"]["images"] = FULL_CONFIG["train"]["images"]
        return config

    assert all(shared(variant) == shared("dit") for variant in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_flops_are_the_planners(variant: str, tmp_path: Path) -> None:
    config = run_config(FULL, variant, 0, tmp_path, tmp_path / "run")
    assert flops_per_image(config) == pytest.approx(planned_flops(config.model).train, rel=0.01)


def record(step: int, **values: Any) -> StepRecord:
    return StepRecord(step=step, images_seen=32 * step, **values)


def test_step_timer_leaves_out_pauses_and_the_first_step(tmp_path: Path) -> None:
    timer = StepTimer(tmp_path)
    steps = [{"pause_seconds": 0.0}, {"pause_seconds": 0.0}, {"pause_seconds": 1.0}, {"pause_seconds": 0.0}]
    steps.append({"pause_seconds": 0.0, "validation_loss": 1.0})
    for number, metrics in enumerate(steps, start=1):
        timer.on_step(Clock(8 * number, number), record(number, logged=True, **metrics))
    assert seconds_per_image(tmp_path, global_batch=8)["measured_steps"] == 2


def test_a_burst_of_other_load_does_not_count(tmp_path: Path) -> None:
    intervals = [(10, 0.8, 0.4), (10, 0.8, 0.4), (10, 80.0, 0.6), (5, 0.4, 0.2), (5, 0.4, 0.2)]
    lines = [json.dumps({"steps": steps, "wall_seconds": wall, "cpu_seconds": cpu}) for steps, wall, cpu in intervals]
    (tmp_path / "times.jsonl").write_text("\n".join([*lines, '{"steps": 5, "wall_sec']))  # a crash cut the last one
    cost = seconds_per_image(tmp_path, global_batch=8)
    assert cost == pytest.approx({"wall_seconds_per_image": 0.01, "cpu_seconds_per_image": 0.005, "measured_steps": 40})


def test_a_turn_ends_at_its_images_and_not_before() -> None:
    heartbeat = Heartbeat()
    turn = Turn(heartbeat, until=64)
    turn.on_step(Clock(32, 1), record(1))
    assert not heartbeat.stop_requested
    turn.on_step(Clock(64, 2), record(2))
    assert heartbeat.stop_requested


def test_models_of_a_seed_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    order = []

    def train(config: Config, comm: object, until: int) -> ExitCode:
        order.append((config.model.variant, until))
        seen[config.run_dir] = until
        return ExitCode.REQUEUE if len(order) == 3 else ExitCode.DONE

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "is_trained", lambda config, until: seen.get(config.run_dir, 0) >= until)
    experiment = Experiment(QUICK, tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    assert experiment._train(0, 1e-3) == ExitCode.REQUEUE  # a stop ends the experiment within its turn
    assert order == [("dit", 128), ("switch", 128), ("dit", 256)]
    monkeypatch.setattr(experiment, "_result", lambda variant, seed, config: {"config": stages.recorded(config)})
    assert experiment._train(0, 1e-3) == ExitCode.DONE  # and what had its turn is not trained again
    assert order[3:] == [("switch", 256)]
    seen.clear()
    assert experiment._train(0, 1e-3) == ExitCode.DONE and len(order) == 4  # nor what has left its result
    with pytest.raises(
        DataError, match=r"dit-seed0\.json: was made with optimizer\.learning_rate 0\.001.* now has 0\.002"
    ):
        experiment._train(0, 2e-3)


def test_a_search_that_was_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(QUICK, tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    losses = dict(zip(QUICK.learning_rates, (2.0, 1.0), strict=True))
    trained = []

    def train(config: Config, comm: object) -> ExitCode:
        trained.append(config.optimizer.learning_rate)
        return ExitCode.DONE

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "held_out_curve", lambda run_dir: [{"validation_loss": losses[trained[-1]]}])
    for _ in range(2):
        assert experiment._search() == (ExitCode.DONE, QUICK.learning_rates[1])
    assert trained == list(QUICK.learning_rates)
    longer = Experiment(replace(QUICK, search_images=128), tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    assert longer._search()[0] == ExitCode.DONE and len(trained) == 2 * len(QUICK.learning_rates)


def test_a_run_is_finished_at_its_last_image_only(tmp_path: Path) -> None:
    config = run_config(QUICK, "dit", 0, tmp_path, tmp_path)
    assert not is_trained(config)
    record = {"images_seen": 128, "validation_loss": 1, "validation_mse": 1, "validation_loss_by_timestep": []}
    total = config.train.total_images
    for images_seen in (128, total):
        assert not is_trained(config)
        line = json.dumps({**record, "validation_images": 1, "images_seen": images_seen})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")
    assert is_trained(config, until=128) and not is_trained(config)  # the last checkpoint is not there
    checkpoint_of(tmp_path, total).mkdir(parents=True)
    assert is_trained(config) and not is_trained(config, until=2 * total)


def test_kept_checkpoints_are_those_that_are_scored() -> None:
    for scale in (FULL, QUICK):
        config = run_config(scale, "dit", 0, Path("work"), Path("run"))
        every = config.checkpoint.keep_every_images
        assert every is not None and all(images % every == 0 for images in scale.scored_after)
        assert scale.turn_images % config.validation.every_images == 0  # by which a turn is known to be over
        assert max(scale.scored_after) < config.train.total_images


def test_written_values_are_read_back(tmp_path: Path) -> None:
    experiment = Experiment(QUICK, tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    values = {"a": [1, 2.5], "b": {"c": None}}
    experiment._write("x.json", values)
    assert experiment._read("x.json") == values
    assert experiment._read("y.json") is None


def test_a_signal_ends_the_experiment_and_the_end_of_a_turn_does_not(tmp_path: Path) -> None:
    """Also in the last step of a turn or of the run, whose held-out loss is then missing until the next launch."""
    script = Path(__file__).with_name("stopped_training.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    done, stopped = [ExitCode.DONE, True], [ExitCode.REQUEUE, False]
    assert found == {"never": [done, done], "128": [stopped, done, done], "256": [done, stopped, done]}


@pytest.mark.slow
def test_quick_experiment_goes_on_and_writes_its_study(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "convergence.py"), "--quick", "--work", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> str:
        result = subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    first = run()
    turns = run_config(QUICK, "dit", 0, tmp_path, tmp_path).train.total_images // QUICK.turn_images
    assert turns > 1 and first.count(" training ") == len(QUICK.variants) * len(QUICK.seeds) * turns
    results = tmp_path / "results"
    runs = study.read_runs(results)
    assert [list(seeds) for seeds in runs.values()] == [list(QUICK.seeds)] * len(QUICK.variants)
    assert [gates["images_seen"] for gates in runs["switch"][0]["gates"]] == [*QUICK.scored_after, 256]
    table = (tmp_path / "README.md").read_text()
    assert tables.results_table(runs) in table
    assert (tmp_path / "curves.png").stat().st_size < 500_000
    assert {path.stem for path in results.glob("*.png")} == set(QUICK.variants) and (tmp_path / "samples.png").exists()

    lost = results / "switch-seed1.json"
    before = lost.read_text()
    lost.unlink()
    again = run()
    assert " training " not in again and again.count(" scoring ") == len(QUICK.scored_after) + 1
    assert json.loads(lost.read_text())["scores"] == json.loads(before)["scores"]
