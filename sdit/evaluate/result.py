"""The result of an evaluation: scores with all that they depend on, as JSON and as lines for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdit.checkpoint.model_card import SHOWN
from sdit.evaluate.images import ImageSet
from sdit.evaluate.sample_cache import SampleCache
from sdit.evaluate.score import Scores, software
from sdit.evaluate.trees import TreeImages
from sdit.files import replacing


def write_result(path: Path, scores: Scores, samples: ImageSet, reference: ImageSet | None) -> None:
    """Write a JSON of the scores, the `samples`, the images of the `reference` and the software."""
    facts: dict[str, Any] = {"drawn": samples.facts if isinstance(samples, SampleCache) else {"file": samples.name}}
    trees = {"drawn": samples, "reference_files": reference}
    facts |= {key: images.facts for key, images in trees.items() if isinstance(images, TreeImages)}
    result = {**scores, **facts, "software": software()}
    with replacing(path) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")


def score_line(scores: Scores) -> str:
    """Return the scores in one line; * marks those of too few images."""
    marks = {name: "*" if name in scores["biased"] else "" for name in SHOWN}
    return "  ".join(f"{name} {scores[name]:.6g}{marks[name]}" for name in SHOWN if scores[name] is not None)


def notes(scores: Scores, *sets: ImageSet | None) -> list[str]:
    """Return what to know about the scores, one sentence each: images that were skipped, and too few images."""
    found = [note for images in sets if isinstance(images, TreeImages) for note in images.notes()]
    if scores["biased"]:
        few = "; ".join(f"{name}: {reason}" for name, reason in scores["biased"].items())
        found.append(f"* depends on the number of images, compare only with scores of the same numbers ({few})")
    return found
