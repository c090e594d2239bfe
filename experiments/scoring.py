"""What a checkpoint is worth: held-out losses, scores of its samples, and what its gates have learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.studies import Recipe, Study
from sdit.checkpoint.load import Trained
from sdit.config import SampleConfig
from sdit.data.dataset import PreparedFolder
from sdit.data.pixels import from_levels, to_pixels
from sdit.diffusion import build_objective
from sdit.evaluate.classifier import trained_features
from sdit.evaluate.features import rebatched
from sdit.evaluate.generate import Generator
from sdit.evaluate.images import LabelledImages
from sdit.evaluate.metrics import frechet_distance, precision_recall
from sdit.evaluate.statistics import statistics_of
from sdit.model import solve_assignment
from sdit.observe.routing import Snapshot, chosen_experts, gate_entropy, path_overlap, prior_agreement, task_paths
from sdit.randomness import Purpose, normal_noise
from sdit.time_law import TimeLaw, prior_law

NEAR, FAR = 50, 500  # tasks apart: neighbours, and strangers
OVERLAP_CELLS = 25  # the (T, T) map of overlaps is kept at this resolution
BLOCK, TIME_BINS = 50, 20  # images of a block of held-out losses; bins of the time axis
LOSS_SEED = 15_000  # of the times and the noise of held-out losses
BATCH = 500


class Scorer:
    """Holds samples against the training images, in features of a classifier trained on them."""

    def __init__(self, study: Study, work: Path) -> None:
        self._study, self._work = study, work
        real = LabelledImages("training images", PreparedFolder(work / "data" / "train"))
        pixels, labels = real.arrays()
        pixels = padded(pixels)
        self._network = trained_features(pixels, labels, real.classes, seed=0, cache=work / "features")
        self._real = statistics_of([pixels], self._network)

    def score(self, trained: Trained, recipe: Recipe, images: int, guidance: float = 1.0) -> dict[str, Any]:
        """Scores of a model's samples: the same labels, noise and sampler for every model of a recipe."""
        facts = {"sampler": recipe.sampler, "steps": recipe.steps, "guidance": guidance}
        labels = np.resize(np.array(trained.classes.labels, dtype=np.int64), images)
        scores = self._scores(draw(trained, labels, facts), labels)
        return {"images_seen": trained.clock.images_seen, **scores, **facts, "weights": "ema"}

    def floor(self) -> dict[str, Any]:
        """The scores of as many real held-out images: what a perfect model would get."""
        pixels, labels = LabelledImages("held-out images", PreparedFolder(self._work / "data" / "test")).arrays()
        count = self._study.sampled_images
        return {**self._scores(pixels[:count], labels[:count]), "features": self._network.facts}

    def _scores(self, pixels: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """`fid`, `precision` and `recall` of all images, `curve_fid` of the first ones, and the accuracy.

        `accuracy` is the share of images that the classifier gives their label. FID grows as images become fewer, so that a
        curve needs as many at each point.
        """
        features, logits = map(
            np.concatenate, zip(*map(self._network, rebatched([padded(pixels)], BATCH)), strict=True)
        )
        assert self._real.features is not None
        precision, recall = precision_recall(self._real.features, features)
        return {
            "images": len(pixels), "fid": self._fid(features), "curve_fid": self._fid(features[: self._study.curve_images]),
            "precision": precision, "recall": recall, "accuracy": float((logits.argmax(1) == labels).mean()),
        }  # fmt: skip

    def _fid(self, features: np.ndarray) -> float:
        wide, real = features.astype(np.float64), self._real
        return frechet_distance(wide.mean(0), np.cov(wide, rowvar=False), real.mean, real.covariance)


def padded(pixels: np.ndarray) -> np.ndarray:
    """Images (n, H, H, C) with a border of zeros up to the next power of two, which the classifier needs."""
    border = (1 << (pixels.shape[1] - 1).bit_length()) - pixels.shape[1]
    sides = (border // 2, border - border // 2)
    return np.pad(pixels, ((0, 0), sides, sides, (0, 0)))


def draw(trained: Trained, labels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """(n, H, W, C) uint8: image i has labels[i], from the same noise for every model."""
    sampler = SampleConfig(**trained.config.sample.model_dump() | settings)
    return np.concatenate([to_pixels(images) for images in Generator(trained, sampler, batch=100).images(labels)])


class HeldOutImages:
    """The first `count` held-out images with fixed times and noise, on which models are compared image by image."""

    def __init__(self, folder: Path, count: int) -> None:
        pixels, labels = LabelledImages("held-out images", PreparedFolder(folder)).arrays()
        count = min(count, len(pixels)) // BLOCK * BLOCK
        self._x0 = from_levels(pixels[:count].transpose(0, 3, 1, 2))
        self._labels = labels[:count]
        self._noise = normal_noise(LOSS_SEED, np.arange(count), self._x0.shape[1:], Purpose.NOISE)

    def losses(self, trained: Trained) -> dict[str, Any]:
        """Losses of the averaged weights, by block and by time.

        Each block of 50 images has one time in each 50th of the time axis, so that the means of blocks are independent
        estimates of the same loss. `blocks` are these means, with the variational bound's term where the variance is learned.
        `bins` are means of the error in 20 parts of the time axis, from the least noise to the most.
        """
        config, count = trained.config, len(self._x0)
        objective = build_objective(config.diffusion, config.model.timesteps)
        law = TimeLaw("stratified")
        times = np.concatenate(
            [law.draw(LOSS_SEED, first, BLOCK, objective.timesteps) for first in range(0, count, BLOCK)]
        )
        found = []
        with torch.no_grad():
            for rows in np.split(np.arange(count), range(BATCH, count, BATCH)):
                x0, t, y, noise = (
                    torch.from_numpy(each[rows]) for each in (self._x0, times, self._labels, self._noise)
                )
                parts = objective(trained.model, x0, t, y, noise)
                found.append(torch.stack([parts.mse + parts.vlb, parts.mse]).double().numpy())
        loss, mse = np.concatenate(found, axis=1)
        position = times / (objective.timesteps or 1)
        bins = [
            mse[np.minimum(position * TIME_BINS, TIME_BINS - 1).astype(int) == each].mean() for each in range(TIME_BINS)
        ]
        return {
            "images_seen": trained.clock.images_seen, "images": count, "block_images": BLOCK,
            "blocks": loss.reshape(-1, BLOCK).mean(1).round(6).tolist(), "bins": np.round(bins, 6).tolist(),
        }  # fmt: skip


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
