"""Results of finished runs: reading, measures, and differences to the baseline seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.studies import Recipe, Study
from sdit.errors import DataError

Run = dict[str, Any]
Measure = Callable[[Run], float | None]


@dataclass(frozen=True)
class Results:
    """The finished runs of a recipe: variant, in the order of the study -> seed -> result."""

    study: Study
    recipe: Recipe
    runs: dict[str, dict[int, Run]]

    def label(self, variant: str) -> str:
        return self.study.variants[variant].label

    @property
    def compared(self) -> list[str]:
        """The variants other than the baseline."""
        return [name for name in self.runs if name != self.recipe.baseline]

    def pairs(self, variant: str, other: str | None = None) -> list[tuple[Run, Run]]:
        """A variant's run and the other's (None: the baseline's), by seed, which fixes data order, times and noise."""
        others = self.runs.get(other or self.recipe.baseline, {})
        return [(run, others[seed]) for seed, run in sorted(self.runs[variant].items()) if seed in others]

    def values(self, variant: str, measure: Measure) -> list[float]:
        """The measure of every seed that has it."""
        return [value for _, run in sorted(self.runs[variant].items()) if (value := measure(run)) is not None]

    def differences(self, variant: str, measure: Measure, other: str | None = None) -> list[float]:
        """The variant's measure less the other's, of every seed that has both."""
        both = [(measure(run), measure(run_of_other)) for run, run_of_other in self.pairs(variant, other)]
        return [mine - others for mine, others in both if mine is not None and others is not None]

    def milliseconds(self, run: Run) -> float:
        """Time of training for an image."""
        return 1e3 * run["cost"][f"{self.study.clock}_seconds_per_image"]

    def relative_time(self, variant: str, other: str | None = None) -> list[float]:
        """Time of the whole training over the other's, seed by seed, without checkpoints and held-out losses."""
        pairs = self.pairs(variant, other)
        return [self.milliseconds(a) * images_seen(a) / (self.milliseconds(b) * images_seen(b)) for a, b in pairs]


def images_seen(run: Run) -> int:
    """Training images of the whole run."""
    seen: int = run["held_out"][-1]["images_seen"]
    return seen


def held_out_loss(run: Run) -> float:
    """At the end of the run, with the averaged weights: by image where it was scored so, else as the trainer measured it."""
    return loss_curve(run)[-1][1]


def has_losses(run: Run) -> bool:
    """Whether held-out images were scored one by one up to the end of the run."""
    return bool(run["losses"]) and run["losses"][-1]["images_seen"] == images_seen(run)


def loss_curve(run: Run) -> list[tuple[int, float]]:
    """(images seen, held-out loss)."""
    if run.get("losses"):
        return [(each["images_seen"], statistics.mean(each["blocks"])) for each in run["losses"]]
    return [(record["images_seen"], record["validation_loss"]) for record in run["held_out"]]


def fid_curve(run: Run) -> list[tuple[int, float]]:
    """(images seen, FID of as many samples at each point)."""
    return [
        (score["images_seen"], score.get("curve_fid", score["fid"])) for score in run["scores"] if is_unguided(score)
    ]


def is_unguided(score: dict[str, Any]) -> bool:
    return bool(score.get("guidance", 1.0) == 1.0)


def final(key: str, guided: bool = False) -> Measure:
    """A score of samples at the end of a run; None where it is not known."""

    def measure(run: Run) -> float | None:
        last = [score for score in run["scores"] if score["images_seen"] == images_seen(run)]
        return next((score.get(key) for score in last if is_unguided(score) != guided), None)

    return measure


fid = final("fid")


def error_bins(run: Run) -> list[float | None]:
    """Held-out error of the prediction in equal parts of the time axis, from the least noise to the most."""
    bins: list[float | None]
    bins = run["losses"][-1]["bins"] if run.get("losses") else run["held_out"][-1]["validation_loss_by_timestep"]
    return bins


def read_results(study: Study, folder: Path) -> list[Results]:
    """The results of each recipe in a folder. Raises: DataError when they are not of one experiment."""
    found = []
    for recipe in study.recipes:
        runs: dict[str, dict[int, Run]] = {}
        for name in (name for name, variant in study.variants.items() if variant.recipe == recipe):
            read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}-seed*.json"))]
            scored = {run["seed"]: run for run in read if not study.loss_images or has_losses(run)}
            if scored:
                runs[name] = scored
        for name, seeds in runs.items():
            twins = runs.get(study.variants[name].timed_as or "", {})
            for seed in seeds.keys() & twins.keys():
                key = f"{study.clock}_seconds_per_image"
                seeds[seed]["cost"][key] = twins[seed]["cost"][key]
        check_alike(runs)
        found.append(Results(study, recipe, runs))
    return found


def changed_keys(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value then, value now) of what two configs hold differently; keys that one of them does not know are equal."""
    for key in then.keys() & now.keys():
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            yield from changed_keys(then[key], now[key], f"{prefix}{key}.")
        elif then[key] != now[key]:
            yield f"{prefix}{key}", then[key], now[key]


def check_alike(runs: dict[str, dict[int, Run]]) -> None:
    """Raises: DataError when results differ in more than the model, its prior, the seed and the length."""
    every = [run for seeds in runs.values() for run in seeds.values()]
    for run in every:
        for key, one, other in changed_keys(every[0]["config"], run["config"]):
            if not key.startswith(("model.", "prior.", "seed", "train.images")):
                raise DataError(
                    f"results/{run['variant']}-seed{run['seed']}.json: has {key} {other}, "
                    f"{every[0]['variant']}-seed{every[0]['seed']}.json {one}; legal: results of one experiment"
                )
