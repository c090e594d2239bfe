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

    def score(self, trained: Trained) -> dict[str, Any]:
        """Scores of a model's samples: the same labels, noise and sampler for every model."""
        settings, images = self._settings(trained), self._scale.sampled_images
        facts = {"sampler": settings.sampler, "steps": settings.steps, "guidance": settings.guidance}
        fid = self._fid(self._draw(trained, images))
        return {"images_seen": trained.clock.images_seen, "fid": fid, "images": images, **facts, "weights": "ema"}

    def strip(self, trained: Trained) -> np.ndarray:
        """(classes, H, W, C) uint8: the first image of every class, as it is scored."""
        return next(self._draw(trained, len(trained.classes.labels)))

    def _draw(self, trained: Trained, images: int) -> Iterator[np.ndarray]:
        """(n, H, W, C) uint8 pixels at a time."""
        labels = np.resize(np.array(trained.classes.labels, dtype=np.int64), images)
        return map(to_pixels, Generator(trained, self._settings(trained), batch=100).images(labels))

    def _settings(self, trained: Trained) -> SampleConfig:
        values = trained.config.sample.model_dump() | {"sampler": SAMPLER, "steps": self._scale.sampler_steps}
        return SampleConfig(**values)

    def floor(self) -> dict[str, Any]:
        """The FID of as many real held-out images: what a perfect model would get."""
        pixels, _ = LabelledImages("held-out images", PreparedFolder(self._work / "data" / "test")).arrays()
        real = pixels[: self._scale.sampled_images]
        return {"fid": self._fid(iter([real])), "images": len(real), "features": self._network.facts}

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
