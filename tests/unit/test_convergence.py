"""The experiment behind the convergence table: pairing, spread, resuming, and that variants differ in nothing but the model."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import page, stages, tables
from experiments.bootstrap import NOT_REACHED, RESAMPLES, images_to_reach, interval
from experiments.results import Results, changed_keys, check_alike, fid, held_out_loss, read_results
from experiments.scoring import BLOCK, HeldOutImages
from experiments.stages import Experiment
from experiments.studies import LONG, MODERN, PAPER, SHORT, STUDIES, Recipe, Study, quick
from experiments.training import StepTimer, Turn, checkpoint_of, is_trained, run_config, seconds_per_image
from sdit.checkpoint.load import Trained
from sdit.cli.prepare import main as prepare
from sdit.clock import Clock
from sdit.config import Config
from sdit.data import prepare as preparation
from sdit.errors import ConfigError, DataError, ExitCode
from sdit.model import build_model
from sdit.model.flops import flops_per_image
from sdit.supervise.heartbeat import Heartbeat
from sdit.train.record import StepRecord
from tests.distributed.forks import run_script

ROOT = Path(__file__).resolve().parents[2]
BINS = 20
RECIPE, QUICK = SHORT.recipes[0], quick(SHORT)
GROUP = QUICK.groups[0]
FULL_CONFIG = run_config(SHORT, "dit", 0, Path("work"), Path("run")).model_dump(mode="json")


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
    run = {"variant": variant, "seed": seed, "held_out": [held_out], "scores": scores, "gates": [], "cost": cost}
    return {**run, "config": {**FULL_CONFIG, "seed": seed, "model": FULL_CONFIG["model"] | {"variant": variant}}}


@pytest.fixture
def results() -> Results:
    # The seeds differ by 1, the variants by 0.1 and 0.3 within a seed: only pairing shows that the second is steadily worse.
    runs = {
        "dit": {0: run_of("dit", 0, 1.0, 50.0, 0.004), 1: run_of("dit", 1, 2.0, 60.0, 0.010)},
        "switch": {0: run_of("switch", 0, 1.1, 40.0, 0.006), 1: run_of("switch", 1, 2.3, None, 0.015)},
    }
    return Results(SHORT, RECIPE, runs)


def write(results: Results, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for variant, seeds in results.runs.items():
        for seed, run in seeds.items():
            (folder / f"{variant}-seed{seed}.json").write_text(json.dumps(run))


def test_differences_are_taken_within_a_seed(results: Results) -> None:
    assert results.differences("switch", held_out_loss) == pytest.approx([0.1, 0.3])


def test_the_same_step_has_the_same_time_per_image(results: Results, tmp_path: Path) -> None:
    results.runs["dit-longer"] = {0: run_of("dit-longer", 0, 1.0, 50.0, seconds=0.003)}
    write(results, tmp_path)
    assert read_results(SHORT, tmp_path)[0].relative_time("dit-longer") == [1.0]


def test_a_longer_run_takes_longer(results: Results) -> None:
    results.runs["switch"][0]["held_out"][-1]["images_seen"] *= 2
    assert results.relative_time("switch") == pytest.approx([3.0, 1.5])


def test_times_are_compared_within_a_seed(results: Results) -> None:
    assert results.relative_time("switch") == pytest.approx([1.5, 1.5])
    del results.runs["dit"][0]
    assert results.relative_time("switch") == pytest.approx([1.5])


def test_a_seed_without_a_score_has_no_difference(results: Results) -> None:
    assert results.differences("switch", fid) == pytest.approx([-10.0])
    del results.runs["dit"][0]
    assert results.differences("switch", fid) == []


def test_a_score_of_an_earlier_checkpoint_is_not_the_runs(results: Results) -> None:
    run = results.runs["dit"][0]
    run["scores"][0]["images_seen"] = 50
    assert fid(run) is None


def test_a_score_with_guidance_is_not_the_runs(results: Results) -> None:
    run = results.runs["dit"][0]
    run["scores"][0]["guidance"] = 1.5
    assert fid(run) is None and "50.0" in tables.guided_table(results)


def test_spread_is_that_of_a_sample() -> None:
    assert tables.spread([1.0, 3.0], 2) == "2.00 ± 1.41"
    assert tables.spread([1.0], 2) == "1.00 (1 seed)"
    assert tables.spread([], 2) == "-"
    assert tables.spread([-1.0, -1.0], 1, "+") == "-1.0 ± 0.0"


def test_results_table_has_a_row_for_each_variant(results: Results) -> None:
    lines = tables.results_table(results).splitlines()
    assert len(lines) == 2 + len(results.runs)
    assert "+0.2000 ± 0.1414 [+0.1000, +0.3000], better in 0 of 2" in lines[3]
    assert "-10.0 (1 seed), better in 1 of 1" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    assert "precision" not in lines[0]  # no run has it


def test_models_are_compared_with_one_another(results: Results) -> None:
    results.runs["dit-longer"] = {1: run_of("dit-longer", 1, 2.5, 70.0, 0.030), 2: run_of("dit-longer", 2, 9.0, 9.0)}
    row = tables.pairs_table(results).splitlines()[2]  # in the only seed that both have
    assert "| DiT, 1.125 x the images | 0.500 (1 seed) | -0.2000 (1 seed), better in 1 of 1 |" in row


def test_losses_by_timestep_are_relative_to_the_baseline(results: Results) -> None:
    assert tables.times_table(results).splitlines()[2].count("+12.5 ± 3.5") == tables.TIME_PARTS


def with_losses(run: dict, means: dict[int, float], blocks: int = 40) -> dict:
    """A run whose held-out images were scored one by one: noise of the blocks that all runs share, and the run's own mean."""
    shared = np.random.default_rng(0).normal(0, 5, blocks)
    shared -= shared.mean()
    bins = [1.0] * BINS
    run["losses"] = [
        {"images_seen": seen, "blocks": (shared + mean).tolist(), "bins": bins, "images": 8}
        for seen, mean in means.items()
    ]
    return run


def test_blocks_are_paired_between_models(results: Results) -> None:
    """Their common noise is far larger than the difference of the models and does not widen its interval."""
    for seed in (0, 1):
        with_losses(results.runs["dit"][seed], {100: 2.0})
        with_losses(results.runs["switch"][seed], {100: 1.0})
    assert "[-1.0000, -1.0000], better in 2 of 2" in tables.results_table(results)


def test_images_to_equal_value_of_a_curve_made_by_hand() -> None:
    images, values = (100, 200, 400), (3.0, 2.0, 1.0)
    assert images_to_reach(images, values, 2.5) == 150
    assert images_to_reach(images, values, 1.0) == 400
    assert images_to_reach(images, values, 3.0) == 100
    assert images_to_reach(images, values, 0.99) == NOT_REACHED
    assert images_to_reach((1, 2, 3), (3.0, 1.0, 2.0), 2.0) == 1.5  # the first time counts


def test_images_to_equal_loss_of_both_models(results: Results) -> None:
    for seed in (0, 1):
        with_losses(results.runs["dit"][seed], {50: 4.0, 100: 2.0})
        with_losses(results.runs["switch"][seed], {50: 3.0, 100: 1.0})
    row = tables.equal_table(results).splitlines()[2]
    assert row.startswith("| Switch-DiT (M = 3, k = 2) | not reached [not reached, not reached] | 75 [75, 75] |")
    for seed in (0, 1):  # the longer DiT extends DiT's curve
        longer = with_losses(run_of("dit-longer", seed, 1.0, 50.0), {50: 4.0, 150: 0.5})
        longer["held_out"][-1]["images_seen"] = 150
        results.runs.setdefault("dit-longer", {})[seed] = longer
    assert "| Switch-DiT (M = 3, k = 2) | 133 [133, 133] | 75 [75, 75] |" in tables.equal_table(results)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """400 blocks of deviation 1 in one seed: the mean has a deviation of 1 / 20."""
    values = np.random.default_rng(1).normal(3, 1, (1, 400))
    found = interval([values], float)
    assert found is not None
    half = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=5 * half / np.sqrt(RESAMPLES))


def test_interval_over_seeds_spans_their_values() -> None:
    """Of three seeds, one in 27 resamples is the lowest alone: more than 2.5 %. One seed and one block have no interval."""
    assert interval([np.array([[1.0], [2.0], [6.0]])], float) == pytest.approx((1.0, 6.0))
    assert interval([np.ones((1, 1))], float) is None


def test_blocks_are_replaced_and_the_rest_stays() -> None:
    text = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    filled = page.fill_blocks(text, {"x": "new", "y": "nowhere"})
    assert filled == "a\n<!-- x -->\nnew\n<!-- end x -->\nb\n"
    assert page.fill_blocks(filled, {"x": "new"}) == filled


def test_results_go_to_the_front_page_where_it_is_marked(results: Results, tmp_path: Path) -> None:
    front_page = tmp_path / "FRONT.md"
    write(results, tmp_path / "results")
    front_page.write_text("# x\n<!-- convergence -->\n<!-- end convergence -->\n")
    assert front_page in page.write_page(SHORT, tmp_path, front_page)
    assert tables.results_table(results) in front_page.read_text()


def test_missing_runs_are_named(results: Results) -> None:
    del results.runs["switch"][1]
    lines = page.missing([results]).splitlines()
    assert "* seeds 2: DiT" in lines and "* seeds 1, 2: Switch-DiT (M = 3, k = 2)" in lines
    assert any(line.startswith("* seeds 0, 1, 2: ") and "; DTR; " in line for line in lines)


def test_a_page_of_one_recipe_names_all_runs_of_the_other(tmp_path: Path) -> None:
    runs = {name: {0: with_losses(run_of(name, 0, 1.0, 50.0), {100: 1.0})} for name in ("modern-dit", "modern-switch")}
    write(Results(LONG, MODERN, runs), tmp_path / "results")
    page.write_page(LONG, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "* modern recipe, seeds 1, 2: DiT; Switch-DiT (M = 3, k = 2)\n" in text
    assert "* recipe of the paper, seeds 0, 1, 2: DiT; Switch-DiT (M = 3, k = 2); DiT-MoE" in text
    # DTR, of which no run is there, is named once for each recipe.
    assert page.missing([Results(LONG, MODERN, runs), Results(LONG, PAPER, {})]).count("; DTR; ") == 2
    assert "<!-- results-paper -->\nNo run is finished.\n" in text
    assert tables.results_table(read_results(LONG, tmp_path / "results")[0]) in text


def test_a_run_whose_images_are_not_scored_yet_is_left_out(tmp_path: Path) -> None:
    runs = {"modern-dit": {0: with_losses(run_of("modern-dit", 0, 1.0, None), {50: 1.0})}}
    write(Results(LONG, MODERN, runs), tmp_path)
    assert read_results(LONG, tmp_path)[0].runs == {}


def test_results_of_two_experiments_are_not_put_in_one_table(results: Results) -> None:
    check_alike(results.runs)
    results.runs["switch"][1]["config"]["optimizer"] = {**FULL_CONFIG["optimizer"], "learning_rate": 1.0}
    with pytest.raises(DataError, match=r"switch-seed1\.json: has optimizer\.learning_rate 1\.0, dit-seed0\.json"):
        check_alike(results.runs)


def test_no_results_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result of a finished run"):
        page.write_page(SHORT, tmp_path)


def test_a_row_that_the_study_has_not_is_a_clear_error() -> None:
    assert [group for group in LONG.only(["modern-dtr"]).groups if group] == [("modern-dtr",)]
    with pytest.raises(ConfigError, match="--rows: dtr; legal: modern-dit, "):
        LONG.only(["dtr"])


@pytest.mark.parametrize(("study", "baseline"), [(SHORT, "dit"), (LONG, "modern-dit"), (LONG, "paper-dit")])
def test_variants_of_a_recipe_differ_in_the_model_and_its_prior_only(
    study: Study, baseline: str, tmp_path: Path
) -> None:
    def shared(variant: str) -> dict:
        config = run_config(study, variant, 0, tmp_path, tmp_path / "run").model_dump()
        config.pop("prior")
        for key in ("variant", "experts", "moe", "mlp_ratio", "width", "heads"):
            config["model"].pop(key)
        if variant.endswith("dit-longer"):
            config["train"]["images"] = config["train"]["images"] // 9 * 8
        return config

    recipe = study.variants[baseline].recipe
    rows = [name for name, variant in study.variants.items() if variant.recipe == recipe]
    assert rows[0] == baseline and all(shared(variant) == shared(baseline) for variant in rows)


@pytest.mark.parametrize("recipe", [MODERN, PAPER], ids=lambda recipe: recipe.name)
def test_rows_of_equal_cost_have_equal_flops_or_parameters(recipe: Recipe, tmp_path: Path) -> None:
    models = {
        name: run_config(LONG, f"{recipe.name}-{name}", 0, tmp_path, tmp_path / "run").model
        for name in ("switch", "dit-moe", "dit-wider", "switch-mlp", "dit-large")
    }
    flops = {name: flops_per_image(model).train for name, model in models.items()}
    count = {name: sum(p.numel() for p in build_model(m, device="meta").parameters()) for name, m in models.items()}
    assert flops["dit-moe"] == pytest.approx(flops["switch"], rel=0.01)
    assert count["dit-wider"] == pytest.approx(count["switch"], rel=0.01)
    assert flops["dit-large"] == pytest.approx(flops["switch-mlp"], rel=0.01)
    assert count["dit-large"] == pytest.approx(count["switch-mlp"], rel=0.02)


def test_results_in_the_repository_are_those_of_the_studies(tmp_path: Path) -> None:
    """Their configs are those that the code makes now, so that nothing is trained again."""
    for study in STUDIES.values():
        for results in read_results(study, study.folder / "results"):
            for variant, seeds in results.runs.items():
                for seed, run in seeds.items():
                    rate = run["config"]["optimizer"]["learning_rate"]
                    config = run_config(study, variant, seed, tmp_path, tmp_path, f"optimizer.learning_rate={rate}")
                    assert list(changed_keys(run["config"], stages.recorded(config))) == []


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


def test_commands_of_two_seeds_may_prepare_the_data_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def prepare_both_at_once(_: int) -> None:
        both.wait()
        stages.prepare_data(QUICK, tmp_path)

    opened_journal = preparation.opened_journal

    @contextmanager
    def slow_writer(*arguments: Any) -> Iterator[Any]:
        with opened_journal(*arguments) as journal:
            time.sleep(0.3)  # the other command comes while this one writes
            yield journal

    monkeypatch.setattr(preparation, "opened_journal", slow_writer)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prepare_both_at_once, range(2)))
    assert all((tmp_path / "data" / part / "index.json").exists() for part in ("train", "test"))


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
    experiment._rates[RECIPE] = 1e-3
    assert experiment._train(GROUP, 0) == ExitCode.REQUEUE  # a stop ends the experiment within its turn
    assert order == [("dit", 128), ("switch", 128), ("dit", 256)]
    monkeypatch.setattr(experiment, "_result", lambda variant, seed, config: {"config": stages.recorded(config)})
    assert experiment._train(GROUP, 0) == ExitCode.DONE  # and what had its turn is not trained again
    assert order[3:] == [("switch", 256)]
    seen.clear()
    assert experiment._train(GROUP, 0) == ExitCode.DONE and len(order) == 4  # nor what has left its result
    experiment._rates[RECIPE] = 2e-3
    with pytest.raises(
        DataError, match=r"dit-seed0\.json: was made with optimizer\.learning_rate 0\.001.* now has 0\.002"
    ):
        experiment._train(GROUP, 0)


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
        assert experiment._search(RECIPE) == ExitCode.DONE and experiment._rates[RECIPE] == QUICK.learning_rates[1]
    assert trained == list(QUICK.learning_rates)
    longer = Experiment(replace(QUICK, search_images=128), tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    assert longer._search(RECIPE) == ExitCode.DONE and len(trained) == 2 * len(QUICK.learning_rates)


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


@pytest.mark.parametrize("study", [*STUDIES.values(), *map(quick, STUDIES.values())])
def test_kept_checkpoints_are_those_that_are_scored(study: Study) -> None:
    config = run_config(study, next(iter(study.variants)), 0, Path("work"), Path("run"))
    every = config.checkpoint.keep_every_images
    assert every is not None and all(images % every == 0 for images in study.scored_after)
    assert study.turn_images % config.validation.every_images == 0  # by which a turn is known to be over
    assert max(study.scored_after) < config.train.total_images
    assert {name for group in study.groups for name in group} == set(study.variants)


def test_written_values_are_read_back(tmp_path: Path) -> None:
    experiment = Experiment(QUICK, tmp_path, tmp_path, comm=None)  # type: ignore[arg-type]
    values = {"a": [1, 2.5], "b": {"c": None}}
    experiment._write("x.json", values)
    assert experiment._read("x.json") == values
    assert experiment._read("y.json") is None


def test_a_signal_ends_the_experiment_and_the_end_of_a_turn_does_not(tmp_path: Path) -> None:
    """Also in the last step of a turn or of the run, whose held-out loss is then missing until the next launch."""
    script = Path(__file__).with_name("stopped_training.py")
    status, text = run_script(script, [tmp_path], os.environ, tmp_path / "log", timeout_seconds=300)
    assert status == 0, text[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    done, stopped = [ExitCode.DONE, True], [ExitCode.REQUEUE, False]
    assert found == {"never": [done, done], "128": [stopped, done, done], "256": [done, stopped, done]}


def test_held_out_losses_are_those_of_the_objective(tmp_path: Path) -> None:
    """Block by block on the digits: the mean over blocks is the mean over images, and the bins hold it, too."""
    assert prepare(["digits", "--out", str(tmp_path / "data")]) == 0
    study = quick(LONG)
    config = run_config(study, "modern-dit", 0, tmp_path, tmp_path)
    trained = Trained(build_model(config.model, seed=0).eval(), config, Clock(0, 0), tmp_path)
    found = HeldOutImages(tmp_path / "data", 230).losses(trained)
    assert found["images"] == 200 and len(found["blocks"]) == 200 // BLOCK and len(found["bins"]) == BINS
    again = HeldOutImages(tmp_path / "data", 200).losses(trained)
    assert again == found
    # A new model predicts zero, so the loss is the mean square of noise - x0.
    assert np.mean(found["blocks"]) == pytest.approx(np.mean(found["bins"]), rel=0.05)
    first = HeldOutImages(tmp_path / "data", BLOCK)
    assert found["blocks"][0] == pytest.approx(((first._noise - first._x0) ** 2).mean(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_quick_study_goes_on_and_writes_its_page(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "convergence.py"), "--study", name, "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    study = quick(STUDIES[name])

    def run(*more: str) -> str:
        result = subprocess.run(
            [*command, "--work", str(tmp_path), *more],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    def count(doing: str, output: str) -> int:
        """Lines of the log that say what was done; the trainer's own lines have the words, too."""
        return len(re.findall(rf"^[\d:]+ {doing} ", output, re.MULTILINE))

    rows, last = list(study.variants), list(study.variants)[-1]
    turns = run_config(study, rows[0], 0, tmp_path, tmp_path).train.total_images // study.turn_images
    one = run("--rows", last, "--seeds", "0")  # one row by its own command
    assert turns > 1 and count("training", one) == turns
    first = run()
    assert count("training", first) == (len(rows) * len(study.seeds) - 1) * turns
    results = read_results(study, tmp_path / "results")[0]
    assert {variant: list(seeds) for variant, seeds in results.runs.items()} == {row: [0, 1] for row in rows}
    assert [gates["images_seen"] for gates in results.runs[rows[1]][0]["gates"]] == [256]  # of Switch-DiT
    text = (tmp_path / "README.md").read_text()
    assert (
        tables.results_table(results) in text and tables.equal_table(results) in text and "No run is missing." in text
    )
    assert {path.stem for path in (tmp_path / "results").glob("*.png")} == set(rows)
    assert (tmp_path / "samples.png").exists() and (tmp_path / "gates.png").exists()

    lost = tmp_path / "results" / f"{last}-seed1.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    again = run()
    wanted = len(study.scored_after) + 1 + bool(study.guided_images)
    assert count("training", again) == 0 and count("scoring", again) == wanted
    after = json.loads(lost.read_text())
    assert (after["scores"], after["losses"]) == (before["scores"], before["losses"])
