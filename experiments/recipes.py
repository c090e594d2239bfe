#!/usr/bin/env python3
"""Switch-DiT under the recipe of the paper and under a modern one, at equal training time: FID and class accuracy.

  recipes.py --data digits fashion-mnist    search, 2 recipes x 3 seeds, scores, the table of docs/recipe.md
  recipes.py --data digits --quick          the same with tiny models, in a minute; writes into the work folder only
  recipes.py --write                        only the table, from results/recipes-*.json

The learning rate of each recipe is searched in short runs, which also measure its time per image. The modern recipe then gets as
many images as the paper's recipe has time for. Times are CPU time of one thread, which other load on the machine hardly changes.
The runs of a seed train in turns. After a kill, the same command continues and skips what is finished. Fashion-MNIST needs
Debian's dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdit.cli.parser import Parser
from sdit.cli.process import exit_status, leave
from sdit.errors import ExitCode

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "recipe.md"
PAPER, MODERN = "recipe-paper", "recipe-modern"
NAMES = {PAPER: "paper", MODERN: "modern"}
SEARCH_SEED = 1000  # none of the seeds that are compared
IMAGES = {"digits": 32_768, "fashion-mnist": 16_384}  # of a compared run under the recipe of the paper
SEARCH_IMAGES = 4_096
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
NETWORK_CALLS = 50  # of the sampler for one image
SAMPLERS = {
    PAPER: {"sampler": "dpm++2m", "steps": NETWORK_CALLS},
    MODERN: {"sampler": "heun", "steps": NETWORK_CALLS // 2},
}
DIGITS = (
    "model.depth=4", "model.patch_size=2", "model.input_size=8", "data.flip=false", "checkpoint.keep_every_images=null",
    "validation.images=256",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    work = (options.work or HERE.parent / "runs" / ("recipes-quick" if options.quick else "recipes")).resolve()
    results = work if options.quick else HERE / "results"
    if not options.write:
        from experiments.stages import prepare_data  # torch takes seconds to import: not for --help
        from experiments.variants import QUICK
        from sdit.distributed.comm import Comm, find_rank, set_threads

        info = find_rank(os.environ)
        set_threads(info, 1)
        with Comm(info) as comm:
            for data in options.data:
                scale = replace(QUICK, data=data, search_images=256) if options.quick else full_scale(data)
                folder = work / data
                prepare_data(scale, folder)
                code = Comparison(scale, folder, results / f"recipes-{data}.json", comm).run(options.seeds)
                if code != ExitCode.DONE:
                    return code
    write_table(results, PAGE if results != work else work / "recipes.md")
    return ExitCode.DONE


def full_scale(data: str) -> Any:
    """The sizes of the comparison on one data set."""
    from experiments.variants import FULL

    shape = DIGITS if data == "digits" else ()
    return replace(
        FULL, data=data, overrides=(f"train.images={IMAGES[data]}", *shape), learning_rates=LEARNING_RATES,
        search_images=SEARCH_IMAGES, turn_images=IMAGES[data] // 4,
    )  # fmt: skip


class Comparison:
    """Both recipes on one data set. Its results are one JSON file, which is written after each finished part."""

    def __init__(self, scale: Any, work: Path, path: Path, comm: Any) -> None:
        self._scale, self._work, self._path, self._comm = scale, work, path, comm
        self._result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"search": {}, "runs": {}}

    def run(self, seeds: list[int]) -> ExitCode:
        """Search, train and score what is not finished."""
        code = self._search()
        for seed in seeds if code == ExitCode.DONE else ():
            if f"{PAPER}-{seed}" not in self._result["runs"] or f"{MODERN}-{seed}" not in self._result["runs"]:
                code = self._train(seed)
                if code != ExitCode.DONE:
                    return code
                for recipe in NAMES:
                    self._score(recipe, seed)
        return code

    def _config(self, recipe: str, seed: int, *more: str) -> Any:
        from experiments.training import run_config

        name = f"{recipe}-{seed}" if seed != SEARCH_SEED else f"{recipe}-search-{'-'.join(more)}"
        return run_config(self._scale, recipe, seed, self._work, self._work / "runs" / name.replace("/", "_"), *more)

    def _search(self) -> ExitCode:
        """The learning rate with the lowest held-out loss of each recipe, and its time per image."""
        from experiments.training import held_out_curve, is_trained, seconds_per_image, train

        length = self._scale.search_images
        for rate in self._scale.learning_rates:
            for recipe in NAMES:  # in turns: the times of both are measured side by side
                found = self._result["search"].setdefault(recipe, {})
                if f"{rate:g}" in found:
                    continue
                more = (
                    f"train.images={length}",
                    f"optimizer.learning_rate={rate}",
                    f"validation.every_images={length}",
                )
                config = self._config(recipe, SEARCH_SEED, *more)
                if not is_trained(config):
                    code = train(config, self._comm)
                    if code != ExitCode.DONE:
                        return code
                run_dir = Path(config.run_dir)
                cost = seconds_per_image(run_dir, config.train.global_batch)
                found[f"{rate:g}"] = {
                    "validation_loss": held_out_curve(run_dir)[-1]["validation_loss"],
                    "seconds_per_image": cost["cpu_seconds_per_image"],
                }
                self._write()
        return ExitCode.DONE

    def _rate(self, recipe: str) -> float:
        found = self._result["search"][recipe]
        return float(min(found, key=lambda rate: found[rate]["validation_loss"]))

    def _time_ratio(self) -> float:
        """The time of an image under the modern recipe over that under the paper's."""
        search = self._result["search"]
        pairs = [(search[MODERN][rate], search[PAPER][rate]) for rate in search[PAPER]]
        return statistics.median(one["seconds_per_image"] / other["seconds_per_image"] for one, other in pairs)

    def _run_of(self, recipe: str, seed: int) -> Any:
        """The config of a compared run, as long as the paper's recipe takes for its images."""
        config = self._config(recipe, seed, f"optimizer.learning_rate={self._rate(recipe)}")
        if recipe == PAPER:
            return config
        batch = config.train.global_batch
        images = batch * round(config.train.total_images / self._time_ratio() / batch)
        return self._config(recipe, seed, f"optimizer.learning_rate={self._rate(recipe)}", f"train.images={images}")

    def _train(self, seed: int) -> ExitCode:
        """Both runs of a seed, in turns of equal time."""
        from experiments.training import is_trained, train

        configs = [self._run_of(recipe, seed) for recipe in NAMES]
        turns = -(-configs[0].train.total_images // self._scale.turn_images)
        for turn in range(1, turns + 1):
            for config in configs:
                until = config.train.total_images * turn // turns
                if not is_trained(config, until):
                    code = train(config, self._comm, until if turn < turns else None)
                    if code != ExitCode.DONE:
                        return code
        return ExitCode.DONE

    def _score(self, recipe: str, seed: int) -> None:
        from experiments.scoring import Scorer
        from experiments.training import seconds_per_image
        from sdit.checkpoint.load import load_trained

        config = self._run_of(recipe, seed)
        scorer = Scorer(self._scale, self._work)
        cost = seconds_per_image(Path(config.run_dir), config.train.global_batch)
        score = scorer.score(load_trained(Path(config.run_dir)), **SAMPLERS[recipe])
        seconds = cost["cpu_seconds_per_image"] * config.train.total_images
        facts = {
            "images": config.train.total_images,
            "learning_rate": config.optimizer.learning_rate,
            "seconds": seconds,
        }
        self._result["runs"][f"{recipe}-{seed}"] = {**facts, "fid": score["fid"], "accuracy": score["accuracy"]}
        self._result["floor"] = scorer.floor()
        self._write()

    def _write(self) -> None:
        from sdit.files import replacing

        with replacing(self._path) as file:
            file.write((json.dumps(self._result, indent=1) + "\n").encode())


def write_table(results: Path, page: Path) -> None:
    """Fill the block `recipes` of a page from the JSON files."""
    from experiments.study import fill_blocks

    lines = [
        "| data | recipe | images | CPU seconds of training | learning rate | FID | class accuracy, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(results.glob("recipes-*.json")):
        result, data = json.loads(path.read_text()), path.stem.removeprefix("recipes-")
        for recipe, name in NAMES.items():
            runs = [run for key, run in result["runs"].items() if key.startswith(recipe)]
            if runs:
                row = [
                    data,
                    f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}",
                    f"{runs[0]['images']:,}",
                    spread(runs, "seconds", 0),
                ]
                row += [f"{runs[0]['learning_rate']:g}", spread(runs, "fid", 1), spread(runs, "accuracy", 1, 100)]
                lines.append(f"| {' | '.join(row)} |")
        if "floor" in result:
            floor = result["floor"]
            accuracy = 100 * floor["accuracy"]
            lines.append(f"| {data} | real held-out images | | | | {floor['fid']:.1f} | {accuracy:.1f} |")
    text = page.read_text() if page.exists() else "<!-- recipes -->\n<!-- end recipes -->\n"
    page.write_text(fill_blocks(text, {"recipes": "\n".join(lines)}))
    print(page)


def spread(runs: list[dict[str, Any]], key: str, digits: int, factor: float = 1) -> str:
    """Mean ± standard deviation over the seeds."""
    values = [factor * run[key] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("recipes", __doc__)
    add = parser.add_argument
    add("--work", type=Path, metavar="DIR", help="data, runs and checkpoints (default: runs/recipes, or -quick)")
    add("--data", nargs="+", choices=("digits", "fashion-mnist"), default=["digits", "fashion-mnist"])
    add("--seeds", type=int, nargs="+", metavar="N", default=[0, 1, 2])
    add("--quick", action="store_true", help="tiny models")
    add("--write", action="store_true", help="write the table from the JSON files, train nothing")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    leave(main())
