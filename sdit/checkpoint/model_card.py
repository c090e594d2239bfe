"""The model card of exported weights: what they are, the data, the recipe, the scores and the commit of their run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdit.checkpoint.load import Trained, Weights
from sdit.clock import Clock
from sdit.config import Config
from sdit.config.yaml_text import dump_yaml
from sdit.data.identity import DataIdentity
from sdit.files import read_json
from sdit.model import count_parameters

# Sections of the recipe. The others do not change the weights.
SECTIONS = ("model", "diffusion", "optimizer", "ema", "prior", "balance")
TRAIN_KEYS = ("global_batch", "precision")
SHOWN = ("fid", "kid", "inception_score", "precision", "recall")  # keys of a result of `sdit evaluate`
MOST_CLASSES = 20


def model_card(trained: Trained, weights: Weights) -> dict[str, str]:
    """Return the texts of the card's sections. The model may be on the meta device.

    Scores and commit are from the run's folder, if the checkpoint is in one.
    """
    config, clock, run = trained.config, trained.clock, run_folder(trained.origin)
    kind = "last" if weights == "weight" else f"averaged ({weights})"
    count = count_parameters(trained.model)
    used = f"A sample uses {count.active:,} of them. " if count.active != count.total else ""
    seen = f"{clock.images_seen:,} images ({clock.steps:,} steps)"
    return {
        "trained": f"{used}The weights are the {kind} ones after {seen}.",
        "data": "\n".join(_data(config, trained.data)),
        "recipe": f"Keys that differ from sdit's defaults:\n\n```yaml\n{dump_yaml(_recipe(config)).strip()}\n```",
        "scores": "\n".join(_scores(run, clock)),
        "commit": _code(run),
    }


def run_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the run that holds a checkpoint folder, None if it is elsewhere."""
    folder = checkpoint.resolve().parent.parent  # of RUN/checkpoints/images-N
    return folder if (folder / "checkpoints").is_dir() else None


def _data(config: Config, data: DataIdentity | None) -> Iterator[str]:
    if data is None:
        yield f"The training data are unknown ({config.model.classes} classes)."
        return
    yield f"{data.describe()}."
    if data.class_names:
        more = f" and {len(data.class_names) - MOST_CLASSES} more" if len(data.class_names) > MOST_CLASSES else ""
        yield f"Classes: {', '.join(data.class_names[:MOST_CLASSES])}{more}."


def _recipe(config: Config) -> dict[str, Any]:
    """Return the keys of the recipe that differ from the defaults, by section. No path and no address is one of them."""
    ours, defaults = config.model_dump(mode="json"), Config().model_dump(mode="json")
    ours["train"] = {key: ours["train"][key] for key in TRAIN_KEYS}
    recipe = {section: _different(ours[section], defaults[section]) for section in (*SECTIONS, "train")}
    return {section: keys for section, keys in recipe.items() if keys}


def _different(ours: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in ours.items():
        if isinstance(value, dict):
            value = _different(value, defaults[key] or {})
            if value:
                found[key] = value
        elif value != defaults.get(key):
            found[key] = value
    return found


def _scores(run: Path | None, clock: Clock) -> list[str]:
    """Return a line for the held-out loss and for each result of `sdit evaluate` in the run."""
    lines = []
    if run is not None:
        loss = _held_out(run / "metrics.jsonl", clock.images_seen)
        if loss is not None:
            lines.append(f"- held-out loss {loss[1]:.6g}, measured after {loss[0]:,} images")
        for path in sorted([*run.glob("*.json"), *run.glob("scores/*.json")]):
            lines += _score(path)
    return lines or ["No score of this run is known."]


def _held_out(path: Path, images_seen: int) -> tuple[int, float] | None:
    """Return (images, loss) of the newest held-out loss up to `images_seen`, None if there is none."""
    newest = None
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if '"validation_loss"' not in line:
                    continue
                found = json.loads(line)
                images, loss = found.get("images_seen"), found.get("validation_loss")
                is_earlier = isinstance(images, int) and images <= images_seen
                if is_earlier and isinstance(loss, float) and math.isfinite(loss):
                    newest = images, loss
    except (OSError, ValueError):  # the run has no metrics, or the last line is incomplete
        pass
    return newest


def _score(path: Path) -> list[str]:
    body = read_json(path)
    if body is None or "fid" not in body or not isinstance(body.get("images"), dict):
        return []
    values = [f"{name} {body[name]:.6g}" for name in SHOWN if isinstance(body.get(name), float)]
    images, reference, sampling = body["images"].get("count"), body.get("reference"), body.get("drawn")
    precision = sampling.get("precision", "fp32") if isinstance(sampling, dict) else "fp32"  # old results name none
    sampled = "" if precision == "fp32" else f" sampled in {precision}"
    against = reference.get("name") if isinstance(reference, dict) else None
    name = Path(str(against)).name
    return [f"- {', '.join(values)}: {images:,} images{sampled} against {name} (`{path.name}`)"] if values else []


def _code(run: Path | None) -> str:
    """Return the commit and the version of sdit that trained the run, an empty text if they are unknown."""
    found = read_json(run / "environment.json") if run is not None else None
    return f"Commit {found.get('git_commit')} of sdit, version {found.get('sdit')}." if found else ""
