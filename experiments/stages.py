"""The experiment in the order in which it is done; what is finished is skipped, so that it can be killed anywhere."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import changed_keys
from experiments.scoring import HeldOutImages, Scorer, draw, gates_of
from experiments.studies import SEARCH_SEED, Recipe, Study
from experiments.training import checkpoint_of, held_out_curve, is_trained, run_config, seconds_per_image, train
from sdit.checkpoint.load import load_trained
from sdit.cli.prepare import main as prepare
from sdit.config import Config
from sdit.distributed.comm import Comm, find_rank, set_threads
from sdit.errors import DataError, ExitCode
from sdit.files import file_lock, replacing
from sdit.model import build_model
from sdit.model.flops import flops_per_image
from sdit.observe.sample_grids import save_pixels

# Keys of the config that say where things lie and who is told, not what was computed.
OF_THE_MACHINE: Any = {"run_dir": True, "data": {"path"}, "validation": {"path"}, "supervise": True, "observe": True}
GUIDANCE = 1.5  # of the additional scores


def run_all(study: Study, work: Path, results: Path, seeds: Sequence[int]) -> ExitCode:
    """Search, train, score; each group of variants before the next one. Writes results/*.json."""
    results.mkdir(parents=True, exist_ok=True)
    prepare_data(study, work)
    info = find_rank(os.environ)
    set_threads(info, 1)
    with Comm(info) as comm:
        return Experiment(study, work, results, comm).run(seeds)


def prepare_data(study: Study, work: Path) -> None:
    """Training and held-out images as shards; those that are there are checked. Raises: DataError."""
    pad = ("--pad", str(study.pad)) if study.pad else ()
    work.mkdir(parents=True, exist_ok=True)
    with file_lock(work / "data.lock"):  # commands for other seeds, started at the same time, wait
        for part in ("train", "test"):
            folder = work / "data" / part
            split = ("--split", part) if study.data == "fashion-mnist" else ()
            code = prepare([study.data, *split, *pad, "--jobs", "1", "--out", str(folder)])
            if code != ExitCode.DONE:
                raise DataError(f"{folder}: preparing {study.data} ended with {code}")


def recorded(config: Config) -> dict[str, Any]:
    """The part of a run's config that its result keeps."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude=OF_THE_MACHINE)
    return values


class Experiment:
    """All runs of one study in one process."""

    def __init__(self, study: Study, work: Path, results: Path, comm: Comm) -> None:
        self.study, self.work, self.results, self.comm = study, work, results, comm
        self._rates: dict[Recipe, float] = {}

    def run(self, seeds: Sequence[int]) -> ExitCode:
        """Everything of `seeds` whose result is not there yet; stops early, with the trainer's code, when asked to stop.

        Raises: DataError when a result is there that was made with another config.
        """
        for group in filter(None, self.study.groups):
            code = self._search(self.study.variants[group[0]].recipe)
            for seed in seeds if code == ExitCode.DONE else ():
                code = self._train(group, seed)
                if code != ExitCode.DONE:
                    break
                for variant in group:
                    self._score(variant, seed)
                    self._draw_strip(variant, seed)
            if code != ExitCode.DONE:
                return code
        if self._read("floor.json") is None:
            self._write("floor.json", self._scorer.floor())
        return ExitCode.DONE

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.study, self.work)

    @cached_property
    def _held_out(self) -> HeldOutImages:
        return HeldOutImages(self.work / "data" / "test", self.study.loss_images)

    def _search(self, recipe: Recipe) -> ExitCode:
        """Find the learning rate of the lowest held-out loss among short runs of the recipe's baseline."""
        facts = {"variant": recipe.baseline, "seed": SEARCH_SEED, "images": self.study.search_images}
        name = "-".join(filter(None, ("search", recipe.name)))
        found, length = self._read(f"{name}.json"), self.study.search_images
        rates = list(self.study.learning_rates)
        if found and found | facts == found and [run["learning_rate"] for run in found["runs"]] == rates:
            self._rates[recipe] = found["chosen"]
            return ExitCode.DONE
        runs = []
        for rate in rates:
            run_dir = self.work / "runs" / f"{name}-{rate:g}-{length}"
            more = (f"train.images={length}", f"optimizer.learning_rate={rate}", f"validation.every_images={length}")
            config = run_config(self.study, recipe.baseline, SEARCH_SEED, self.work, run_dir, *more)
            if not is_trained(config):
                say(f"{name}: learning rate {rate:g}")
                code = train(config, self.comm)
                if code != ExitCode.DONE:
                    return code
            runs.append({"learning_rate": rate, "validation_loss": held_out_curve(run_dir)[-1]["validation_loss"]})
        self._rates[recipe] = min(runs, key=lambda run: run["validation_loss"])["learning_rate"]
        self._write(f"{name}.json", {**facts, "runs": runs, "chosen": self._rates[recipe]})
        return ExitCode.DONE

    def _train(self, group: Sequence[str], seed: int) -> ExitCode:
        """Variants of a seed, in turns: what else the machine does meanwhile falls on all of them alike."""
        runs = {variant: self._config(variant, seed) for variant in group}
        runs = {variant: config for variant, config in runs.items() if not self._has_result(variant, seed, config)}
        turn = self.study.turn_images
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

    def _config(self, variant: str, seed: int) -> Config:
        rate = self._rates[self.study.variants[variant].recipe]
        run_dir = self.work / "runs" / f"{variant}-seed{seed}"
        return run_config(self.study, variant, seed, self.work, run_dir, f"optimizer.learning_rate={rate}")

    def _result(self, variant: str, seed: int, config: Config) -> dict[str, Any]:
        """What a finished run leaves behind, before it is scored."""
        curve = held_out_curve(Path(config.run_dir))
        assert curve[-1]["images_seen"] == config.train.total_images, f"{config.run_dir} has not come to its end"
        cost: dict[str, float] = seconds_per_image(Path(config.run_dir), config.train.global_batch)
        parameters = sum(parameter.numel() for parameter in build_model(config.model, device="meta").parameters())
        cost |= {"flops_per_image": flops_per_image(config.model).train, "parameters": parameters}
        result = {"variant": variant, "label": self.study.variants[variant].label, "seed": seed, "cost": cost}
        return {**result, "config": recorded(config), "held_out": curve, "losses": [], "scores": [], "gates": []}

    def _score(self, variant: str, seed: int) -> None:
        """Held-out losses, scores of samples and what the gates have learned; each is written when it is known."""
        name, config, study = f"{variant}-seed{seed}.json", self._config(variant, seed), self.study
        result, total = self._read(name), config.train.total_images
        assert result is not None
        for seen in self._kept(config) if study.loss_images else ():
            if all(each["images_seen"] != seen for each in result["losses"]):
                self._add(
                    name,
                    result,
                    "losses",
                    self._held_out.losses(load_trained(checkpoint_of(Path(config.run_dir), seen))),
                )
        wanted = [(total, study.sampled_images, 1.0)] + [(seen, study.curve_images, 1.0) for seen in study.scored_after]
        wanted += [(total, study.guided_images, GUIDANCE)] if study.guided_images else []
        for seen, images, guidance in wanted:
            if any((score["images_seen"], score["guidance"]) == (seen, guidance) for score in result["scores"]):
                continue
            say(f"scoring {variant}, seed {seed}, after {seen} images, guidance {guidance:g}")
            trained = load_trained(checkpoint_of(Path(config.run_dir), seen))
            self._add(
                name, result, "scores", self._scorer.score(trained, study.variants[variant].recipe, images, guidance)
            )
        if config.model.variant == "switch" and not result["gates"]:
            self._add(name, result, "gates", gates_of(load_trained(checkpoint_of(Path(config.run_dir), total))))

    def _kept(self, config: Config) -> list[int]:
        """The images seen at the checkpoints that a run keeps."""
        total, every = config.train.total_images, config.checkpoint.keep_every_images
        return [*range(every or total, total, every or total), total]

    def _add(self, name: str, result: dict[str, Any], key: str, value: dict[str, Any]) -> None:
        result[key] = sorted([*result[key], value], key=lambda each: each["images_seen"])
        self._write(name, result)

    def _draw_strip(self, variant: str, seed: int) -> None:
        """The first sample of every class of the first seed's model, as they are scored, for people to look at."""
        path, recipe = self.results / f"{variant}.png", self.study.variants[variant].recipe
        if seed == self.study.seeds[0] and not path.exists():
            trained = load_trained(self.work / "runs" / f"{variant}-seed{seed}")
            labels = np.array(trained.classes.labels, dtype=np.int64)
            pixels = draw(trained, labels, {"sampler": recipe.sampler, "steps": recipe.steps, "guidance": 1.0})
            save_pixels(path, pixels, len(labels))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.results / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _write(self, name: str, values: dict[str, Any]) -> None:
        """One key a line: short files that still compare well."""
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
        with replacing(self.results / name) as file:
            file.write(f"{{\n{lines}\n}}\n".encode())


def say(text: str) -> None:
    """A line of the log, with the time."""
    print(time.strftime("%H:%M:%S", time.gmtime()), text, flush=True)
