"""Scores of images against a reference."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from sdit import __version__
from sdit.errors import ConfigError
from sdit.evaluate import metrics
from sdit.evaluate.features import Batches, FeatureNetwork
from sdit.evaluate.reference import Reference, check_network, reference_of
from sdit.evaluate.statistics import FeatureStatistics, statistics_of

__all__ = ["Reference", "Scores", "reference_of", "score", "score_statistics", "software"]

Scores = dict[str, Any]


def score(images: Batches, reference: Reference, network: FeatureNetwork, seed: int = 0) -> Scores:
    """All scores of a stream of images (n, H, W, C) uint8, with what they depend on, as JSON.

    Keys: `fid`, `kid`, `kid_deviation`, `inception_score`, `inception_score_deviation`, `precision`, `recall`, `metrics`,
    `features`, `reference`, `images`. A score that the reference does not allow is None. `compared` is the number of
    images whose single features KID, precision and recall use; `seed` decides KID's subsets and the Inception score's splits.

    Raises:
        ConfigError: network, images and reference do not fit together.
        DataError: too few images.
    """
    check_network(reference, network)
    return score_statistics(statistics_of(images, network), reference, seed) | {"features": network.facts}


def software() -> dict[str, str]:
    """Versions of the packages that compute images and scores."""
    return {"sdit": __version__} | {name: metadata.version(name) for name in ("torch", "torchmetrics", "numpy")}


def score_statistics(drawn: FeatureStatistics, reference: Reference, seed: int) -> Scores:
    """All scores from statistics alone."""
    real = reference.statistics
    if drawn.mean.shape != real.mean.shape:
        raise ConfigError(f"--reference: {reference.name} holds {len(real.mean)} features, not {len(drawn.mean)}")
    assert drawn.features is not None and drawn.logits is not None
    kid = kid_spread = precision = recall = subset = None
    if real.features is not None:
        subset = metrics.subset_size(real.features, drawn.features)
        kid, kid_spread = metrics.kernel_distance(real.features, drawn.features, seed)
        precision, recall = metrics.precision_recall(real.features, drawn.features)
    inception, spread = metrics.inception_score(drawn.logits, seed)
    return {
        "fid": metrics.frechet_distance(drawn.mean, drawn.covariance, real.mean, real.covariance),
        "kid": kid,
        "kid_deviation": kid_spread,
        "inception_score": inception,
        "inception_score_deviation": spread,
        "precision": precision,
        "recall": recall,
        "metrics": {
            "seed": seed,
            "kid_subsets": metrics.KID_SUBSETS,
            "kid_subset_size": subset,
            "inception_score_splits": metrics.SPLITS,
            "neighbours": metrics.NEIGHBOURS,
        },
        "reference": {
            "name": reference.name,
            "images": real.count,
            "sha256": real.images,
            "compared": None if real.features is None else len(real.features),
        },
        "images": {"count": drawn.count, "sha256": drawn.images, "compared": len(drawn.features)},
    }
