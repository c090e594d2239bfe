"""What a checkpoint is worth: FID of its samples, and what its gates have learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.variants import Scale
from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.data.dataset import PreparedFolder
from sdit.data.pixels import to_pixels
from sdit.evaluate.classifier import trained_features
from sdit.evaluate.generate import Generator
from sdit.evaluate.images import LabelledImages
from sdit.evaluate.metrics import frechet_distance
from sdit.evaluate.statistics import statistics_of
from sdit.model import solve_assignment
from sdit.observe.routing import Snapshot, chosen_experts, gate_entropy, path_overlap, prior_agreement, task_paths
from sdit.time_law import TimeLaw, prior_law

SAMPLER = "dpm++2m"
NEAR, FAR = 50, 500  # tasks apart: neighbours, and strangers
OVERLAP_CELLS = 25  # the (T, T) map of overlaps is kept at this resolution


class Scorer:
    """Holds samples against the training images, in features of a classifier trained on them."""

    def __init__(self, scale: Scale, work: Path) -> None:
        self._scale, self._work = scale, work
        real = LabelledImages("training images", PreparedFolder(work / "data" / "train"))
        pixels, labels = real.arrays()
        self._network = trained_features(pixels, labels, real.classes, seed=0, cache=work / "features")
        self._real = statistics_of(real.batches(), self._network)

    def score(self, trained: Trained, **settings: Any) -> dict[str, Any]:
        """Scores of a model's samples: the same labels and noise for every model, and the same sampler without `settings`.

        `accuracy` is the share of samples that the classifier gives the label they were drawn for.
        """
        sampler, images = self._settings(trained, **settings), self._scale.sampled_images
        facts = {"sampler": sampler.sampler, "steps": sampler.steps, "guidance": sampler.guidance}
        labels = np.resize(np.array(trained.classes.labels, dtype=np.int64), images)
        pixels = np.concatenate(list(self._draw(trained, labels, sampler)))
        scores = {"fid": self._fid(iter([pixels])), "accuracy": self._accuracy(pixels, labels)}
        return {"images_seen": trained.clock.images_seen, **scores, "images": images, **facts, "weights": "ema"}

    def strip(self, trained: Trained) -> np.ndarray:
        """(classes, H, W, C) uint8: the first image of every class, as it is scored."""
        labels = np.array(trained.classes.labels, dtype=np.int64)
        return next(self._draw(trained, labels, self._settings(trained)))

    def _draw(self, trained: Trained, labels: np.ndarray, settings: SampleConfig) -> Iterator[np.ndarray]:
        """(n, H, W, C) uint8 pixels at a time."""
        return map(to_pixels, Generator(trained, settings, batch=100).images(labels))

    def _settings(self, trained: Trained, **settings: Any) -> SampleConfig:
        common = {"sampler": SAMPLER, "steps": self._scale.sampler_steps}
        return SampleConfig(**trained.config.sample.model_dump() | common | settings)

    def floor(self) -> dict[str, Any]:
        """The scores of as many real held-out images: what a perfect model would get."""
        pixels, labels = LabelledImages("held-out images", PreparedFolder(self._work / "data" / "test")).arrays()
        real = pixels[: self._scale.sampled_images]
        scores = {"fid": self._fid(iter([real])), "accuracy": self._accuracy(real, labels[: len(real)])}
        return {**scores, "images": len(real), "features": self._network.facts}

    def _accuracy(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        return float((self._network(pixels)[1].argmax(1) == labels).mean())

    def _fid(self, images: Iterator[np.ndarray]) -> float:
        drawn, real = statistics_of(images, self._network), self._real
        return frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance)


def gates_of(trained: Trained) -> dict[str, Any]:
    """What the gates of all blocks choose for all T tasks, exactly: no images are needed.

    `loads` (depth, M) expected share of the samples that use an expert; `overlap` (25, 25) mean share of units that two
    tasks have in common, over equal parts of the time axis; `near` and `far` its mean over tasks at most 50, and at least
    500 apart.
    """
    gate_probs = trained.model.all_gate_probs()
    probs, model = gate_probs.numpy(), trained.config.model
    top_k = model.experts.top_k
    weights = TimeLaw.of(trained.config.diffusion).task_weights(model.timesteps)
    paths = task_paths(probs, top_k)
    overlap, agreement = (
        path_overlap(paths),
        prior_agreement(paths, solve_assignment(gate_probs, model, prior_law(trained.config))),
    )
    tasks = np.arange(model.timesteps)
    apart = np.abs(tasks[:, None] - tasks[None, :])
    cell = model.timesteps // OVERLAP_CELLS
    cells = overlap.reshape(OVERLAP_CELLS, cell, OVERLAP_CELLS, cell).mean(axis=(1, 3))
    kept = np.take_along_axis(probs, chosen_experts(probs, top_k), axis=-1).sum(-1)  # (depth, T)
    return {
        "images_seen": trained.clock.images_seen,
        "loads": Snapshot.take(0, probs, top_k, None, task_weights=weights).loads.round(4).tolist(),
        "unused_experts": int((~paths.any(0)).sum()),
        "distinct_paths": len(np.unique(paths, axis=0)),
        "near": float(overlap[(apart > 0) & (apart <= NEAR)].mean()),
        "far": float(overlap[apart >= FAR].mean()),
        "prior_agreement": agreement,
        "entropy": float(gate_entropy(probs).mean()),
        "kept_probability": float(kept.mean()),
        "overlap": cells.round(3).tolist(),
    }
