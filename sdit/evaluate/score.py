"""Scores of images against a reference."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from sdit import __version__
from sdit.evaluate import metrics
from sdit.evaluate.features import Batches, FeatureNetwork
from sdit.evaluate.reference import Reference, check_dimensions, check_network
from sdit.evaluate.statistics import FeatureStatistics, Seen, statistics_of

Scores = dict[str, Any]

# Images of each set below which a score depends on their number. FID and the Inception score have a bias of order 1/N
# (Chong and Forsyth 2020); radii of precision and recall shrink with N; KID is unbiased, but its subsets are of 1,000.
NEEDED = {"fid": 10_000, "kid": 1_000, "inception_score": 10_000, "precision": 10_000, "recall": 10_000}


def score(
    images: Batches, reference: Reference, network: FeatureNetwork, seed: int = 0, seen: Seen | None = None
) -> Scores:
    """All scores of a stream of images (n, H, W, C) uint8, with what they depend on, as JSON.

    Keys: `fid`, `kid`, `kid_deviation`, `inception_score`, `inception_score_deviation`, `precision`, `recall`, `biased`,
    `metrics`, `features`, `reference`, `images`. A score that the reference does not allow is None. `compared` is the number of
    images whose single features KID, precision and recall use; `seed` decides KID's subsets and the Inception score's splits.
    `seen` is called with the number of images that were read.

    Raises:
        ConfigError: network, images and reference do not fit together.
        DataError: too few images.
    """
    check_network(reference, network)
    return score_statistics(statistics_of(images, network, seen), reference, seed) | {"features": network.facts}


def software() -> dict[str, str]:
    """Versions of the packages that compute images and scores."""
    return {"sdit": __version__} | {name: metadata.version(name) for name in ("torch", "torchmetrics", "numpy")}


def biased(drawn: FeatureStatistics, real: FeatureStatistics, is_paired: bool) -> dict[str, str]:
    """Why a score is not comparable with those of enough images, by its name; a score of enough images is left out.

    `is_paired`: single features were compared, so that there are KID, precision and recall.
    """
    assert drawn.features is not None
    compared = {"drawn": len(drawn.features), "reference": None if real.features is None else len(real.features)}
    counts: dict[str, dict[str, int | None]] = {
        "fid": {"drawn": drawn.count, "reference": real.count},
        "inception_score": {"drawn": drawn.count},
    } | ({name: compared for name in ("kid", "precision", "recall")} if is_paired else {})
    found = {}
    for name, sets in counts.items():
        few = [f"{count} {which}" for which, count in sets.items() if count is not None and count < NEEDED[name]]
        if few:
            found[name] = f"{' and '.join(few)} images, fewer than {NEEDED[name]}"
    return found


def score_statistics(drawn: FeatureStatistics, reference: Reference, seed: int) -> Scores:
    """All scores from statistics only."""
    real = reference.statistics
    check_dimensions(reference, len(drawn.mean))
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
        "biased": biased(drawn, real, kid is not None),
        "metrics": {
            "seed": seed,
            "kid_subsets": metrics.KID_SUBSETS,
            "kid_subset_size": subset,
            "inception_score_splits": metrics.SPLITS,
            "neighbours": metrics.NEIGHBOURS,
            "needed": NEEDED,
        },
        "reference": {
            "name": reference.name,
            "images": real.count,
            "sha256": real.images,
            "compared": None if real.features is None else len(real.features),
        },
        "images": {"count": drawn.count, "sha256": drawn.images, "compared": len(drawn.features)},
    }
