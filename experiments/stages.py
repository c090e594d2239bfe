"""The experiment in the order in which it is done; what is finished is skipped, so that it can be killed anywhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.scoring import Scorer, gates_of
from experiments.study import changed_keys
from experiments.training import (
    checkpoint_of,
    flops_per_image,
    held_out_curve,
    is_trained,
    run_config,
    seconds_per_image,
    train,
)
from experiments.variants import BASELINE, SEARCH_SEED, VARIANTS, Scale
from sdit.checkpoint.load import load_trained
from sdit.cli.prepare import main as prepare
from sdit.config import Config
from sdit.distributed.comm import Comm, find_rank, set_threads
from sdit.errors import DataError, ExitCode
from sdit.files import replacing
from sdit.model import build_model
from sdit.observe.sample_grids import save_pixels

# Keys of the config that say where things lie and who is told, not what was computed.
OF_THE_MACHINE: Any = {"run_dir": True, "data": {"path"}, "validation": {"path"}, "supervise": True, "observe": True}


def run_all(scale: Scale, work: Path, results: Path, seeds: Sequence[int]) -> ExitCode:
    """Search, train, score; every variant of a seed before the next seed. Writes results/*.json."""
    results.mkdir(parents=True, exist_ok=True)
    prepare_data(scale, work)
    info = find_rank(os.environ)
    set_threads(info, 1)
    with Comm(info) as comm:
        experiment = Experiment(scale, work, results, comm)
        return experiment.run(seeds)


def prepare_data(scale: Scale, work: Path) -> None:
    """Training and held-out images as shards; those that are there are checked. Raises: DataError."""
    pad = ("--pad", "32") if scale.data == "fashion-mnist" else ()
    for part in ("train", "test"):
        folder = work / "data" / part
        split = ("--split", part) if scale.data == "fashion-mnist" else ()
        code = prepare([scale.data, *split, *pad, "--jobs", "1", "--out", str(folder)])
        if code != ExitCode.DONE:
            raise DataError(f"{folder}: preparing {scale.data} ended with {code}")


def recorded(config: Config) -> dict[str, Any]:
    """The part of a run's config that its result keeps."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude=OF_THE_MACHINE)
    return values


class Experiment:
    """All runs of one scale in one process."""

    def __init__(self, scale: Scale, work: Path, results: Path, comm: Comm) -> None:
        self.scale, self.work, self.results, self.comm = scale, work, results, comm

    def run(self, seeds: Sequence[int]) -> ExitCode:
        """Everything of `seeds` whose result is not there yet; stops early, with the trainer's code, when asked to stop.

        Raises: DataError when a result is there that was made with another config.
        """
        code, rate = self._search()
        if code != ExitCode.DONE:
            return code
        for seed in seeds:
            code = self._train(seed, rate)
            if code != ExitCode.DONE:
                return code
            self._score(seed, rate)
        for seed in seeds:
            for images_seen in self.scale.scored_after:
                self._score(seed, rate, images_seen)
        self._draw_strips(seeds)
        if self._read("floor.json") is None:
            self._write("floor.json", self._scorer.floor())
        return ExitCode.DONE

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.scale, self.work)

    def _search(self) -> tuple[ExitCode, float]:
        """The learning rate of the lowest held-out loss among short runs of the baseline."""
        facts = {"variant": BASELINE, "seed": SEARCH_SEED, "images": self.scale.search_images}
        found = self._read("search.json")
        rates = list(self.scale.learning_rates)
        if found and found | facts == found and [run["learning_rate"] for run in found["runs"]] == rates:
            return ExitCode.DONE, found["chosen"]
        losses = {}
        for rate in self.scale.learning_rates:
            length = self.scale.search_images
            run_dir = self.work / "runs" / f"search-{rate:g}-{length}"
            more = (f"train.images={length}", f"optimizer.learning_rate={rate}", f"validation.every_images={length}")
            config = run_config(self.scale, BASELINE, SEARCH_SEED, self.work, run_dir, *more)
            if not is_trained(config):
                say(f"search: learning rate {rate:g}")
                code = train(config, self.comm)
                if code != ExitCode.DONE:
                    return code, rate
            losses[rate] = held_out_curve(run_dir)[-1]["validation_loss"]
        chosen = min(losses, key=lambda rate: losses[rate])
        runs = [{"learning_rate": rate, "validation_loss": loss} for rate, loss in losses.items()]
        self._write("search.json", {**facts, "runs": runs, "chosen": chosen})
        return ExitCode.DONE, chosen

    def _run_dir(self, variant: str, seed: int) -> Path:
        return self.work / "runs" / f"{variant}-seed{seed}"

    def _train(self, seed: int, rate: float) -> ExitCode:
        """All variants of a seed, in turns: what else the machine does meanwhile falls on all of them alike."""
        runs = {variant: self._config(variant, seed, rate) for variant in self.scale.variants}
        runs = {variant: config for variant, config in runs.items() if not self._has_result(variant, seed, config)}
        turn = self.scale.turn_images
        turns = max((-(-config.train.total_images // turn) for config in runs.values()), default=0)
        for number in range(1, turns + 1):
            for variant, config in runs.items():
                until = min(number * turn, config.train.total_images)
                if is_trained(config, until):
                    continue
                say(f"training {variant}, seed {seed}, to {until} images")
                code = train(config, self.comm, until)
                if code != ExitCode.DONE:
                    return code
        for variant, config in runs.items():
            self._write(f"{variant}-seed{seed}.json", self._result(variant, seed, config))
        return ExitCode.DONE

    def _has_result(self, variant: str, seed: int, config: Config) -> bool:
        """Raises: DataError when there is one that was made with another config."""
        name = f"{variant}-seed{seed}.json"
        result = self._read(name)
        if result is None:
            return False
        for key, then, now in changed_keys(result["config"], recorded(config)):
            raise DataError(
                f"{self.results / name}: was made with {key} {then}, the experiment now has {now}; "
                "legal: --results and --work of other folders, or without that file"
            )
        return True

    def _config(self, variant: str, seed: int, rate: float) -> Config:
        run_dir = self._run_dir(variant, seed)
        return run_config(self.scale, variant, seed, self.work, run_dir, f"optimizer.learning_rate={rate}")

    def _result(self, variant: str, seed: int, config: Config) -> dict[str, Any]:
        """What a finished run leaves behind, before it is scored."""
        run_dir = Path(config.run_dir)
        cost = seconds_per_image(run_dir, config.train.global_batch)
        cost |= {"flops_per_image": flops_per_image(config), "parameters": _parameters(config.model)}
        result = {"variant": variant, "label": VARIANTS[variant].label, "seed": seed, "cost": cost}
        result |= {"config": recorded(config)}
        curve = held_out_curve(run_dir)
        assert curve[-1]["images_seen"] == config.train.total_images, f"{run_dir} has not come to its end"
        return {**result, "held_out": curve, "scores": [], "gates": []}

    def _score(self, seed: int, rate: float, images_seen: int | None = None) -> None:
        """Scores, and what the gates have learned, of all variants of a seed after so many images (None: at the end)."""
        for variant in self.scale.variants:
            name = f"{variant}-seed{seed}.json"
            result = self._read(name)
            assert result is not None
            seen = images_seen or self._config(variant, seed, rate).train.total_images
            if any(score["images_seen"] == seen for score in result["scores"]):
                continue
            say(f"scoring {variant}, seed {seed}, after {seen} images")
            trained = load_trained(checkpoint_of(self._run_dir(variant, seed), seen))
            result["scores"].append(self._scorer.score(trained))
            result["scores"].sort(key=lambda score: score["images_seen"])
            if trained.config.model.variant == "switch":
                result["gates"].append(gates_of(trained))
                result["gates"].sort(key=lambda gates: gates["images_seen"])
            self._write(name, result)

    def _draw_strips(self, seeds: Sequence[int]) -> None:
        """A few samples of every model of the first seed, for people to look at."""
        for variant in self.scale.variants:
            path = self.results / f"{variant}.png"
            if self.scale.seeds[0] in seeds and not path.exists():
                trained = load_trained(self._run_dir(variant, self.scale.seeds[0]))
                save_pixels(path, self._scorer.strip(trained), len(trained.classes.labels))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.results / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write(self, name: str, values: dict[str, Any]) -> None:
        """One key a line: short files that still compare well."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        with replacing(self.results / name) as file:
            file.write(f"{{\n{lines}\n}}\n".encode())


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in build_model(model, device="meta").parameters())


def say(text: str) -> None:
    """A line of the log, with the time."""
    print(time.strftime("%H:%M:%S", time.gmtime()), text, flush=True)
